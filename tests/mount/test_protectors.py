"""A mounted volume and its protectors: opened by each kind, changed under programs' hands, locked by a token's end."""

from __future__ import annotations

import errno
import json
import os
from typing import Any

import pytest
import trio

from cryptfs.cli.mounts import wait_until
from cryptfs.format.volume import parse_volume
from cryptfs.keys.agent_client import open_agent
from cryptfs.keys.edit_requests import commit, set_policy
from cryptfs.ops.volume_file import VolumeEdit
from scripts import reference_decrypt as reference
from tests.mount.box import Box
from tests.mount.memory import found_in
from tests.mount.syscalls import refused
from tests.softhsm import PIN, SoftHsm

pytestmark = pytest.mark.mount

CONTENT = bytes(range(256)) * 256


@pytest.fixture
def token(box: Box) -> SoftHsm:
    """A SoftHSM with the token `card`, which the box's agent knows."""
    hsm = SoftHsm(box.root / "hsm").set_up()
    hsm.make_token("card")
    config = box.root / "c" / "cryptfs" / "agent.toml"
    config.parent.mkdir(parents=True)
    config.write_text(hsm.agent_toml())
    return hsm


def set_reverify(box: Box, seconds: int) -> None:
    """The volume must be unlocked."""

    async def change() -> None:
        with VolumeEdit.of(box.vault) as edit:
            volume_id = parse_volume(edit.data).volume_id
            async with open_agent(str(box.agent_socket)) as client:
                edit.replace(await set_policy(client, volume_id, edit.data, {"reverify_s": seconds}))
                await commit(client, volume_id, edit.data)

    trio.run(change)


def state(box: Box) -> str:
    [volume] = json.loads(box.run("status", "--json").stdout)
    found: str = volume["state"]
    return found


def reverified(box: Box) -> list[dict[str, Any]]:
    """The lines of the audit log about it."""
    return [json.loads(line) for line in box.run("audit", "show", "--json", "--verb", "reverify").stdout.splitlines()]


def test_one_volume_and_four_ways_in(box: Box, token: SoftHsm) -> None:
    keyfile, paper = box.root / "key", box.root / "paper"
    box.mount()
    (box.clear / "file").write_bytes(CONTENT)
    box.run("protector", "add", box.vault, "--new-keyfile", keyfile)
    box.run("protector", "add", box.vault, "--kind", "recovery", "--out", paper)
    box.run("protector", "add", box.vault, "--token", "card", env={"CRYPTFS_NEW_PIN": PIN})
    said = box.run("protector", "add", box.vault, "--new-keyfile", box.clear / "key", "--label", "inside").stderr
    assert "inside the volume that it opens" in said
    assert (box.clear / "file").read_bytes() == CONTENT
    (box.clear / "file2").write_bytes(CONTENT[::-1])
    box.umount()
    pinfile = box.root / "pin"
    pinfile.write_text(PIN)
    pinfile.chmod(0o600)
    for options in (("--keyfile", keyfile), ("--recovery-file", paper), ("--pinfile", pinfile)):
        box.run_without_passphrase("mount", *options, box.vault, box.clear)
        assert (box.clear / "file").read_bytes() == CONTENT
        assert (box.clear / "file2").read_bytes() == CONTENT[::-1]
        (box.clear / options[0]).write_bytes(CONTENT)
        box.umount()
    box.run("check", "--deep", box.vault)
    box.run("protector", "remove", box.vault, "passphrase", "--yes")
    box.mount(code=2)
    box.run_without_passphrase("mount", "--keyfile", keyfile, box.vault, box.clear)
    box.run("protector", "remove", box.vault, "recovery", "--yes")
    (box.clear / "file").unlink()
    box.umount()
    box.run_without_passphrase("mount", "--recovery-file", paper, box.vault, box.clear, code=2)
    box.run_without_passphrase("check", "--deep", "--keyfile", keyfile, box.vault)


def mount_by_token(box: Box) -> None:
    box.unlock()
    box.run("protector", "add", box.vault, "--token", "card", env={"CRYPTFS_NEW_PIN": PIN})
    set_reverify(box, 5)
    box.run("lock", box.vault)
    box.run_without_passphrase("mount", "--protector", "pkcs11", box.vault, box.clear, env={"CRYPTFS_PIN": PIN})


def test_a_deleted_token_locks_the_mounted_volume_and_another_protector_resumes_it(box: Box, token: SoftHsm) -> None:
    mount_by_token(box)
    file = box.clear / "file"
    file.write_bytes(CONTENT)
    fd = os.open(file, os.O_RDWR)
    try:
        assert not wait_until(lambda: state(box) != "unlocked", 7), "it goes on while the token is there"
        os.pwrite(fd, b"written before", 0)
        token.delete_token("card")
        assert wait_until(lambda: state(box) == "locked", 30)
        with refused(errno.ENOKEY):
            os.pread(fd, 100, 4096)
        with refused(errno.ENOKEY):
            os.listdir(box.clear)
        lines = reverified(box)
        assert [(line["outcome"], line["detail"]["then"]) for line in lines] == [("denied", "locked")]
        assert "not in the token any more" in lines[0]["detail"]["message"]
        said = box.run_without_passphrase("unlock", box.vault, code=30, env={"CRYPTFS_PIN": PIN}).stderr
        assert "is not there" in said
        box.unlock()
        assert os.pread(fd, 14, 0) == b"written before"
        assert not wait_until(lambda: state(box) != "unlocked", 7), "a passphrase opened it: no token is asked"
    finally:
        os.close(fd)
    box.umount()


def test_a_token_that_cannot_be_seen_locks_and_opens_again_when_it_is_back(box: Box, token: SoftHsm) -> None:
    mount_by_token(box)
    (box.clear / "file").write_bytes(CONTENT)
    # The key itself is as it was; to SoftHSM it is gone.
    away = token.tokens.with_name("away")
    token.tokens.rename(away)
    assert wait_until(lambda: state(box) == "locked", 40)
    assert reverified(box)[-1]["detail"]["then"] == "locked"
    away.rename(token.tokens)
    box.run_without_passphrase("unlock", "--protector", "pkcs11", box.vault, env={"CRYPTFS_PIN": PIN})
    assert (box.clear / "file").read_bytes() == CONTENT
    box.umount()


def test_no_secret_stays_in_the_agents_memory(root: None, box: Box, token: SoftHsm) -> None:
    """Of a key file, a recovery key and a PIN, and of the root keys behind them: while unlocked, and after `lock`."""
    keyfile, paper, pin = box.root / "key", box.root / "paper", "a PIN that is long enough to be found"
    token.make_token("long", pin)
    box.run("agent", "run")
    box.run("protector", "add", box.vault, "--new-keyfile", keyfile)
    box.run("protector", "add", box.vault, "--kind", "recovery", "--out", paper)
    box.run("protector", "add", box.vault, "--token", "long", env={"CRYPTFS_NEW_PIN": pin})
    recovery = reference.recovery_key(paper.read_text().splitlines()[-1])
    secrets = {keyfile.read_bytes(): "key file", recovery: "recovery key", pin.encode(): "PIN"}
    for protector in parse_volume((box.vault / "volume").read_bytes()).protectors:
        secret = {"keyfile": keyfile.read_bytes(), "recovery": recovery}.get(protector.kind)
        if secret is not None:
            secrets[reference.root_key(protector.kind, dict(protector.params), secret)] = (
                f"root key of {protector.kind}"
            )
    assert len(secrets) == 5
    [agent] = box.agent_pids()
    volume_id = parse_volume((box.vault / "volume").read_bytes()).volume_id
    for options, env in (
        (("--keyfile", keyfile), {}),
        (("--recovery-file", paper), {}),
        (("--protector", "pkcs11"), {"CRYPTFS_PIN": pin}),
    ):
        box.run_without_passphrase("unlock", *options, box.vault, env=env)
        while_unlocked = found_in(agent, secrets)
        assert found_in(agent, {volume_id: "volume id"}), "the search would find nothing anywhere"
        box.run("lock", box.vault)
        assert (options[0], while_unlocked, found_in(agent, secrets)) == (options[0], {}, {})
    box.run("agent", "stop")
