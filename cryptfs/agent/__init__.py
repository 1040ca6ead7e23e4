"""The key agent: the one process that holds KEKs and does every wrap and unwrap (docs/AGENT_PROTOCOL.md).

server      sockets, connections, the process's life
service     verbs: arguments checked, volumes attached, errors turned into codes
unlocking   a `volume` file and a secret -> KEKs; a new volume
keyring     KEKs -> keys in clear and wrapped
"""
