"""Extended attributes in `check`, `check --repair` and what a salvage carries over."""

from __future__ import annotations

from pathlib import Path

import pytest

from cryptfs.errors import Damaged
from tests.check.lab import Lab, flip, summary

NAMES = (b"/small", b"/docs/a", b"/link", b"/pipe", b"/docs")


async def each(lab: Lab, value: bytes | None) -> dict[bytes, bytes | str]:
    """Set `trusted.t` of each to `value`, or, for None, what each has."""
    store = lab.store()
    volume = await lab.sample.open(store)
    out: dict[bytes, bytes | str] = {}
    try:
        for path in NAMES:
            inode = volume.root
            for name in path.split(b"/")[1:]:
                inode = (await volume.names.lookup(inode, name)).inode
                inode.lookups += 1
            try:
                if value is not None:
                    await volume.xattrs.set(inode, b"trusted.t", value)
                out[path] = await volume.xattrs.get(inode, b"trusted.t")
            except OSError as error:
                out[path] = str(error.strerror)
            except Damaged as error:
                out[path] = error.reason
    finally:
        assert await volume.close()
        store.close_store()
    return out


@pytest.fixture
async def lab(tmp_path: Path) -> Lab:
    made = Lab(tmp_path)
    await made.make()
    await each(made, b"value")
    return made


async def test_what_is_well_is_well(lab: Lab) -> None:
    report = await lab.check(deep=True)
    assert not report.findings, summary(report.findings)


@pytest.mark.parametrize("path", [b"/small", b"/pipe"])
async def test_damaged_ones_are_found_and_given_up(lab: Lab, path: bytes) -> None:
    places = await lab.places()
    flip(lab.sidecar(places[path][1]), -30)
    found = {(f.what.value, f.path) for f in (await lab.check()).findings}
    assert found == {("xattrs", path)}
    assert (await each(lab, None))[path] == "frame"
    report = await lab.repair()
    assert [f.action for f in report.findings] == ["they cannot be read; removed"], summary(report.findings)
    assert not (await lab.check(deep=True)).damage
    wanted = dict.fromkeys(NAMES, b"value") | {path: "No data available"}
    assert await each(lab, None) == wanted
    content = await lab.read()
    assert all(content[path] == data for path, data in lab.content.items())


async def test_a_salvaged_file_keeps_them(lab: Lab) -> None:
    places = await lab.places()
    with places[b"/docs/a"][0].open("ab") as data:
        data.write(b"more")
    report = await lab.repair(deep=True)
    assert any("written anew" in f.action for f in report.findings), summary(report.findings)
    assert (await each(lab, None))[b"/docs/a"] == b"value"
