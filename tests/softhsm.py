"""SoftHSM 2 tokens of a test's own: a real PKCS#11 module, its configuration and tokens in a temporary directory."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

MODULE_PATH = "/usr/lib/softhsm/libsofthsm2.so"
MODULE = "softhsm"
PIN = "271828"
SO_PIN = "31415926"


@dataclass(frozen=True)
class SoftHsm:
    """Where one SoftHSM keeps its tokens."""

    directory: Path

    @property
    def config(self) -> Path:
        return self.directory / "softhsm2.conf"

    @property
    def tokens(self) -> Path:
        return self.directory / "tokens"

    @property
    def environment(self) -> dict[str, str]:
        return {"SOFTHSM2_CONF": str(self.config)}

    def set_up(self) -> SoftHsm:
        self.tokens.mkdir(parents=True)
        self.config.write_text(
            f"directories.tokendir = {self.tokens}\nobjectstore.backend = file\nlog.level = ERROR\n"
            "slots.removable = false\n"
        )
        return self

    def agent_toml(self) -> str:
        return (
            f'[pkcs11]\nwritable = ["{self.tokens}"]\nenvironment = {{ SOFTHSM2_CONF = "{self.config}" }}\n'
            f'[pkcs11.modules]\n{MODULE} = "{MODULE_PATH}"\n'
        )

    def make_token(self, label: str, pin: str = PIN) -> None:
        self._util("--init-token", "--free", "--label", label, "--so-pin", SO_PIN, "--pin", pin)

    def delete_token(self, label: str) -> None:
        self._util("--delete-token", "--token", label)

    def _util(self, *words: str) -> None:
        environment = {**os.environ, **self.environment}
        subprocess.run(["softhsm2-util", *words], env=environment, check=True, capture_output=True, timeout=60)
