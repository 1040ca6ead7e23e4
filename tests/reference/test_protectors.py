"""The reference opens a volume by what FORMAT.md says of each kind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cryptfs.format.recovery_key import KEY_BYTES, to_text
from scripts import reference_decrypt
from tests.mount.box import Box


@pytest.mark.mount
def test_key_files_and_recovery_keys(box: Box) -> None:
    keyfile, paper = box.root / "key", box.root / "paper"
    box.run("protector", "add", box.vault, "--new-keyfile", keyfile)
    box.run("protector", "add", box.vault, "--kind", "recovery", "--out", paper)
    box.mount()
    (box.clear / "file").write_bytes(b"content")
    box.umount()
    script = Path(reference_decrypt.__file__)
    for number, options in enumerate((("--keyfile", keyfile), ("--recovery-file", paper))):
        dest = box.root / f"out{number}"
        subprocess.run([sys.executable, script, box.vault, dest, *options], check=True, timeout=60)
        assert (dest / "file").read_bytes() == b"content"
    other = box.root / "other"
    other.write_bytes(bytes(64))
    ended = subprocess.run(
        [sys.executable, script, box.vault, "--list", "--keyfile", other], check=False, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (1, "error: no protector opens with this keyfile\n")


@given(
    st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES),
    st.integers(0, 49),
    st.sampled_from("0123456789ABCDEFGHJKMNPQRSTVWXYZ"),
)
def test_it_reads_recovery_keys_and_finds_the_same_errors(key: bytes, at: int, wrong: str) -> None:
    text = to_text(key).replace("-", "")
    assert reference_decrypt.recovery_key(text) == key
    if text[at] != wrong:
        with pytest.raises(reference_decrypt.Damaged, match=f"^group {at // 5 + 1} of"):
            reference_decrypt.recovery_key(text[:at] + wrong + text[at + 1 :])
