"""The key agent: the one process that holds KEKs and does every wrap and unwrap (docs/AGENT_PROTOCOL.md).

server      sockets, connections, the process's life
service     which verb is whose; errors turned into codes
*_verbs     verbs: arguments checked, then done: `open`, `lock`, `attach`, `key` (the data path), `edit`
volumes     what is unlocked or mounted, and what begins and ends with that
unlocking   a `volume` file and a secret -> KEKs; a new volume
keyring     KEKs -> keys in clear and wrapped
"""
