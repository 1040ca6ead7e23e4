"""One SoftHSM for the module, which reads its configuration once per process start of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.softhsm import SoftHsm


@pytest.fixture
def softhsm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SoftHsm]:
    """A SoftHSM with the token `contract`; others are the test's to make."""
    hsm = SoftHsm(tmp_path_factory.mktemp("softhsm")).set_up()
    hsm.make_token("contract")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTHSM2_CONF", str(hsm.config))
        yield hsm
