"""The verbs that make new versions of a `volume` file, and the one that says such a file is in its place.

Each edit takes the file as it is and returns it as it is to be; the caller writes it (`ops.volume_file`) and then says
`commit`. Until then nothing counts: floors stay, keys are made under the KEK version of before. A crash in between
leaves the old file, or the new one, which any later `commit` or `attach` of it makes count.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

from cryptfs.agent import args as arg
from cryptfs.agent import editing
from cryptfs.agent.args import Args
from cryptfs.agent.attempts import Attempts
from cryptfs.agent.audit import Auditor
from cryptfs.agent.freshness import Changes, Records, Seen
from cryptfs.agent.keyring import Keyring
from cryptfs.agent.policies import Policies
from cryptfs.agent.recording import Attachment, Peer, check_file
from cryptfs.agent.shred_places import ShredPlaces
from cryptfs.agent.unlocking import Providers, Unlocked
from cryptfs.agent.volume_args import SECRET_MAX_BYTES, get_keys, get_new_protector, get_policy, get_shred_secret
from cryptfs.agent.volume_in_place import check_in_place
from cryptfs.crypto.secret import Secret
from cryptfs.format.agent_msg import encode_push
from cryptfs.format.volume import FILE_MAX_BYTES, LABEL_MAX_CHARS, Volume
from cryptfs.ports import Clock, Random

log = logging.getLogger(__name__)

T = TypeVar("T")


class Editing:
    """`verbs` by name. `in_thread` runs what may run a KDF; `attached` is the service's own table.

    `cipher_dir` says where a volume lies; empty: unknown.
    """

    def __init__(  # noqa: PLR0913 - what the verbs work on
        self, *, keyring: Keyring, records: Records, audit: Auditor, attached: MutableMapping[bytes, Attachment],
        providers: Providers, places: ShredPlaces, random: Random, clock: Clock,
        in_thread: Callable[[Callable[[], Any]], Awaitable[Any]], policies: Policies, attempts: Attempts,
        cipher_dir: Callable[[bytes], bytes],
    ) -> None:  # fmt: skip
        self._keyring = keyring
        self._records = records
        self._audit = audit
        self._attached = attached
        self._providers = providers
        self._places = places
        self._random = random
        self._clock = clock
        self._in_thread = in_thread
        self._policies = policies
        self._attempts = attempts
        self._cipher_dir = cipher_dir
        self.verbs: Mapping[str, Callable[[Peer, Args], Awaitable[dict[str, Any]]]] = {
            "policy-set": self._policy_set,
            "feature-add": self._feature_add,
            "protector-add": self._protector_add,
            "protector-remove": self._protector_remove,
            "protector-change": self._protector_change,
            "rotate-kek": self._rotate_kek,
            "destroy-keks": self._destroy_keks,
            "commit": self._commit,
        }

    # protectors and policy -------------------------------------------------------------------------------------

    async def _policy_set(self, _peer: Peer, args: Args) -> dict[str, Any]:
        arg.expect(args, "volume_id", "volume", "policy")
        policy = get_policy(args, "policy")
        return await self._edited(args, lambda now: editing.with_policy(now, policy))

    async def _feature_add(self, _peer: Peer, args: Args) -> dict[str, Any]:
        arg.expect(args, "volume_id", "volume", "feature")
        feature = arg.get_text(args, "feature", LABEL_MAX_CHARS)
        return await self._edited(args, lambda now: editing.with_feature(now, feature))

    async def _protector_add(self, _peer: Peer, args: Args) -> dict[str, Any]:
        arg.expect(args, "volume_id", "volume", "kind", "wish", "label", "secret", "shred_secret")
        new = get_new_protector(args, self._now_s())

        def add(now: Unlocked, secret: Secret, shred: Secret | None) -> Unlocked:
            return editing.with_protector(now, new, secret, self._providers, self._random, shred)

        return await self._edited_with_secret(args, add)

    async def _protector_remove(self, _peer: Peer, args: Args) -> dict[str, Any]:
        arg.expect(args, "volume_id", "volume", "protector_id")
        protector_id = arg.get_id(args, "protector_id")
        return await self._edited(args, lambda now: editing.without_protector(now, protector_id))

    async def _protector_change(self, _peer: Peer, args: Args) -> dict[str, Any]:
        arg.expect(args, "volume_id", "volume", "protector_id", "kind", "wish", "label", "secret", "shred_secret")
        protector_id = arg.get_id(args, "protector_id")
        new = get_new_protector(args, self._now_s())

        def change(now: Unlocked, secret: Secret, shred: Secret | None) -> Unlocked:
            return editing.with_changed_protector(now, protector_id, new, secret, self._providers, shred)

        return await self._edited_with_secret(args, change)

    # KEK versions ----------------------------------------------------------------------------------------------

    async def _rotate_kek(self, _peer: Peer, args: Args) -> dict[str, Any]:
        arg.expect(args, "volume_id", "volume", "carried", "shred_secret")
        with ExitStack() as secrets:
            carried = get_keys(args, "carried", secrets)

            def rotate(now: Unlocked, shred: Secret | None) -> Unlocked:
                return editing.with_new_kek(now, carried, self._providers, self._random, shred)

            return await self._tried(args, secrets, rotate)

    async def _destroy_keks(self, _peer: Peer, args: Args) -> dict[str, Any]:
        arg.expect(args, "volume_id", "volume")
        await self._refuse_older(self._checked(args))
        volume = self._checked(args)
        await self._audit.rewrap(volume.volume_id, volume.kek_version, self._keyring.keks(volume.volume_id))
        return await self._edited(args, editing.without_old_keks)

    async def _commit(self, _peer: Peer, args: Args) -> dict[str, Any]:
        arg.expect(args, "volume_id", "volume")
        volume = self._checked(args)
        await check_in_place(self._cipher_dir(volume.volume_id), volume.volume_id, args["volume"])
        await self._refuse_older(volume)
        # The floor first: if we die here, the old file is refused already, and the new one is durable in its place.
        await self._records.change(volume.volume_id, Changes(seen=Seen(volume.serial, volume.kek_version, 0)))
        # Once more: it may have been locked meanwhile.
        volume = self._checked(args)
        self._keyring.settle(volume.volume_id, volume)
        self._audit.reseal(volume.volume_id, volume.kek_version, self._keyring.keks(volume.volume_id))
        attachment = self._attached.get(volume.volume_id)
        if attachment is not None:
            changed = replace(attachment, serial=volume.serial, kek_version=volume.kek_version, policy=volume.policy)
            self._attached[volume.volume_id] = changed
            attachment.peer.post(encode_push({"event": "changed", "volume_id": volume.volume_id}))
        self._policies.learn(volume.volume_id, volume.serial, volume.policy)
        log.info("volume %s: its file has serial %d now", volume.volume_id.hex(), volume.serial)
        return {"serial": volume.serial, "kek_version": volume.kek_version}

    # inside ----------------------------------------------------------------------------------------------------

    def _now_s(self) -> int:
        return self._clock.time_ns() // 1_000_000_000

    def _checked(self, args: Args) -> Volume:
        return check_file(
            self._keyring, arg.get_id(args, "volume_id"), arg.get_bytes(args, "volume", 0, FILE_MAX_BYTES)
        )

    async def _refuse_older(self, volume: Volume) -> None:
        record = await self._records.opened(volume.volume_id)
        record.seen.refuse_older(volume.serial, volume.kek_version)

    async def _edited_with_secret(
        self, args: Args, work: Callable[[Unlocked, Secret, Secret | None], Unlocked]
    ) -> dict[str, Any]:
        with ExitStack() as secrets:
            secret = secrets.enter_context(Secret.of(arg.get_bytes(args, "secret", 1, SECRET_MAX_BYTES)))
            return await self._tried(args, secrets, lambda now, shred: work(now, secret, shred))

    async def _tried(
        self, args: Args, secrets: ExitStack, work: Callable[[Unlocked, Secret | None], Unlocked]
    ) -> dict[str, Any]:
        """The turn of an edit that tries `secrets`: wrong ones count as those of `unlock`, or nobody would ask there.

        A right one ends no count: a program without the volume's passphrase knows that of a protector it added. `work`
        gets the volume's shred secret, too.
        """
        given = get_shred_secret(args)
        async with self._attempts.next(self._checked(args).volume_id, proves=False):
            volume = self._checked(args)
            # Wiped by the thread, which outlives a client that leaves.
            held = secrets.pop_all()

            def edit(now: Unlocked) -> Unlocked:
                with held, self._places.find(volume, given) or nullcontext() as shred:
                    return work(now, shred)

            return await self._edited(args, edit)

    async def _edited(self, args: Args, work: Callable[[Unlocked], Unlocked]) -> dict[str, Any]:
        """What `work` makes of the volume, as its file's bytes. A KEK that is new there waits for `commit`."""
        # First of all: what is made of an older file would be newer than any, and take back what was removed since.
        await self._refuse_older(self._checked(args))
        volume = self._checked(args)
        data = arg.get_bytes(args, "volume", 0, FILE_MAX_BYTES)
        # Copies: if the volume is locked while the thread works, the keyring's own turn to zeros under it.
        keks = {version: Secret.of(kek.view()) for version, kek in self._keyring.keks(volume.volume_id).items()}
        new: dict[int, Secret] = {}

        def in_thread() -> Unlocked:
            try:
                # Without those that wait for a `commit` that never came.
                made = work(Unlocked(volume, data, {v: kek for v, kek in keks.items() if v <= volume.kek_version}))
                new.update({version: kek for version, kek in made.keks.items() if version > volume.kek_version})
                return made
            finally:
                for kek in keks.values():
                    kek.wipe()

        made: Unlocked = await self._in_thread(in_thread)
        for version, kek in new.items():
            self._keyring.pend(volume.volume_id, version, kek)
        return {"volume": made.data}
