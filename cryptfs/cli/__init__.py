"""The command line: one module per verb, and the only place where an error becomes advice.

main        the verbs, and how any exception becomes an exit code
ui          the rules of output, and the only code that prints
passphrase  the five ways a passphrase can come in
processes   starting agent and daemon by exec, with an environment made for them
key_agent   what the verbs ask of the agent; agent_process starts it
mounts      what /proc says about mount points and daemons
init, mount, umount, unlock, lock, status, info, agent_verbs    the verbs

Verbs import what they need when they run: `cryptfs --version` must not pay for trio, rich or the agent's client.
"""
