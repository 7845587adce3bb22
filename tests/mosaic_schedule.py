"""Runs the bodies of `attention_mosaic_kernels` as they stand, without numbers: a thread for each
warpgroup, in random order, with barriers, copies and products that say what a chip would suffer.

A thread that nothing will wake is a Deadlock. A slot that is filled while a product reads it, or
read while a copy is under way, is an Overwritten.
"""

import random
import threading
from types import SimpleNamespace

import numpy as np

from stablelm_jax.kernels import attention_mosaic_kernels as kernels


class Deadlock(Exception):
    pass


class Overwritten(Exception):
    pass


class Nothing:
    """An array whose numbers do not matter."""

    shape = None

    def _self(self, *_, **__):
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _self
    __le__ = astype = __getitem__ = _self


NOTHING = Nothing()


class Memory:
    """An array with the tag of what lies in each place, and how often it was written."""

    def __init__(self, name, shape, at=()):
        self.name, self.shape, self.dtype, self.index = name, shape, None, at
        self.tags, self.writes = {}, {}

    @property
    def at(self):
        return self

    def __getitem__(self, index):
        part = Memory(self.name, self.shape[1:], index)
        part.tags, part.writes = self.tags, self.writes
        return part

    @property
    def T(self):  # noqa: N802
        return self

    def __setitem__(self, _, value):
        RUN.check_unread(self)


class Barrier:
    """mbarrier: a phase is over after `arrivals`; a thread waits for the parity it has not seen."""

    def __init__(self, arrivals, count):
        self.arrivals, self.arrived, self.phases = arrivals, [0] * count, [0] * count
        self.at = self

    def __getitem__(self, slot):
        return self, int(slot)

    def arrive(self, slot):
        self.arrived[slot] += 1
        if self.arrived[slot] == self.arrivals:
            self.arrived[slot], self.phases[slot] = 0, self.phases[slot] + 1


class Run:
    """One program: its threads take turns, one at a time."""

    def __init__(self, seed):
        self.random, self.turn = random.Random(seed), threading.Condition()
        self.waits, self.seen, self.flying, self.reads = {}, {}, {}, {}
        self.copies, self.now, self.error = [], None, None

    def role(self):
        return self.local.role

    def go(self, body, roles):
        self.local, threads = threading.local(), []
        self.waits = {role: None for role in range(roles)}
        self.now = 0
        for role in range(roles):
            self.flying[role], self.reads[role] = [], []
            threads.append(threading.Thread(target=self._thread, args=(body, role), daemon=True))
            threads[-1].start()
        for thread in threads:
            thread.join(60)
        if self.error:
            raise self.error

    def _thread(self, body, role):
        self.local.role = role
        with self.turn:
            try:
                self.turn.wait_for(lambda: self.now == role or self.error)
                if not self.error:
                    body()
            except Exception as error:
                self.error = self.error or error
            del self.waits[role]
            self._next()

    def _next(self):
        while self.waits and not self.error:
            able = [r for r, wait in self.waits.items() if wait is None or wait()]
            choice = self.random.choice([*able, *self.copies] or [None])
            if choice is None:
                self.error = Deadlock(f"warpgroups {sorted(self.waits)} wait for ever")
            elif choice in able:
                self.now = choice
                break
            else:
                self.copies.remove(choice)
                choice()
        self.turn.notify_all()

    def pause(self, until=None):
        """Lets others run; goes on when it is chosen and `until` holds."""
        role = self.role()
        self.waits[role] = until
        self._next()
        self.turn.wait_for(lambda: self.now == role or self.error)
        if self.error:
            raise self.error
        self.waits[role] = None

    def wait(self, place):
        barrier, slot = place
        key = (self.role(), id(barrier), slot)
        parity = self.seen.get(key, 0) % 2
        self.pause(lambda: barrier.phases[slot] % 2 != parity)
        self.seen[key] = self.seen.get(key, 0) + 1

    def copy(self, source, target, place):
        self.check_unread(target)
        barrier, slot = place
        target.tags[target.index] = None  # under way
        target.writes[target.index] = target.writes.get(target.index, 0) + 1

        def arrive():
            target.tags[target.index] = (source.name, source.index)
            barrier.arrive(slot)

        self.copies.append(arrive)
        self.pause()

    def multiply(self, sums, left, right):
        factors = [x for x in (left, right) if isinstance(x, Memory)]
        for x in factors:
            if x.tags.get(x.index) is None:
                raise Overwritten(f"{x.name} {x.index} is read while it is copied")
        self.reads[self.role()] += [x.tags[x.index] for x in factors]
        self.flying[self.role()].append([(x, x.writes[x.index]) for x in factors])
        self.pause()

    def land(self, number):
        """Products end in order, until so many are left."""
        self.pause()
        flying = self.flying[self.role()]
        while len(flying) > number:
            for x, writes in flying.pop(0):
                if x.writes[x.index] != writes:
                    raise Overwritten(f"{x.name} {x.index} was written while it was read")

    def check_unread(self, target):
        for factors in (f for flying in self.flying.values() for f in flying):
            if any(x.tags is target.tags and x.index == target.index for x, _ in factors):
                raise Overwritten(f"{target.name} {target.index} is written while it is read")


class Sums:
    def __getitem__(self, _):
        RUN.land(0)
        return NOTHING

    def __setitem__(self, _, value):
        assert not RUN.flying[RUN.role()]


RUN: Run


def _loop(begin, end):
    return lambda body: [body(i) for i in range(begin, end)] and None


def _fori(begin, end, body, carry):
    for i in range(begin, end):
        carry = body(i, carry)
    return carry


def _load_sums(sums, wait_n):
    RUN.land(wait_n)
    return NOTHING


def _faked(program):
    nothing = lambda *_, **__: NOTHING  # noqa: E731
    lax = SimpleNamespace(
        axis_index=lambda name: RUN.role() if name == "warpgroup" else program[name],
        rem=lambda a, b: a % b,
        div=lambda a, b: a // b,
        fori_loop=_fori,
        broadcast_in_dim=nothing,
    )
    jnp = SimpleNamespace(int32=int, float32=None, uint32=None, inf=0, zeros=nothing)
    jnp.maximum = lambda a, b: NOTHING if NOTHING in (a, b) else max(a, b)
    jnp.max = jnp.sum = jnp.exp2 = jnp.log2 = jnp.where = nothing
    plgpu = SimpleNamespace(
        ACC=lambda *_: Sums(),
        Layout=kernels.plgpu.Layout,
        barrier_arrive=lambda place: (RUN.pause(), place[0].arrive(place[1])),
        barrier_wait=lambda place: RUN.wait(place),
        broadcasted_iota=nothing,
        commit_smem=lambda: None,
        copy_gmem_to_smem=lambda *x: RUN.copy(*x),
        copy_smem_to_gmem=lambda *_: None,
        layout_cast=nothing,
        load=nothing,
        set_max_registers=lambda n, action: None,
        wait_smem_to_gmem=lambda n: None,
        wgmma=lambda *x: RUN.multiply(*x),
        wgmma_accumulator_load=_load_sums,
        wgmma_wait=lambda n: RUN.land(n),
    )
    pl = SimpleNamespace(
        ds=lambda begin, size: (begin, size),
        loop=_loop,
        run_scoped=lambda body, *x: body(*x),
        when=lambda condition: lambda body: body() if condition else None,
    )
    jax = SimpleNamespace(lax=lax, __version_info__=(0, 12))
    return {"jax": jax, "jnp": jnp, "pl": pl, "plgpu": plgpu}


def run(monkeypatch, kernel, bounds, heads, kv_heads, tile, block, seed) -> Run:
    """One program of the kernel; its `reads`: tags of what each warpgroup's products read."""
    global RUN
    RUN = Run(seed)
    head = heads - 1 if kernel.__name__ != "key_gradients" else kv_heads - 1
    program = {"block": block, "head": head, "row": 0}
    for name, fake in _faked(program).items():
        monkeypatch.setattr(kernels, name, fake)
    ring = lambda name: (  # noqa: E731
        tuple(Memory(f"{name} {i}", (tile.stages, tile.streamed)) for i in range(extra)),
        Barrier(extra, tile.stages),
        Barrier(kernels.CONSUMERS, tile.stages),
    )
    extra = 2 if kernel.__name__ == "key_gradients" else 1
    inputs = {"forward": "sqkv", "query_gradient": "sqkvold", "key_gradients": "sqkvold"}
    outputs = {"forward": "ol", "query_gradient": "g", "key_gradients": "gh"}
    arrays = [
        Memory(name, (1, 0, kv_heads if name in "kv" else heads, 64))
        for name in inputs[kernel.__name__] + outputs[kernel.__name__]
    ]
    scratch = {
        "own": [Memory("own", (kernels.CONSUMERS, 64)) for _ in range(2)],
        "ready": Barrier(1 if kernel.__name__ == "forward" else 2, kernels.CONSUMERS),
        "first": ring("first"),
        "second": ring("second"),
    }
    if tile.turns:
        scratch["turns"] = Barrier(1, kernels.CONSUMERS)
    RUN.go(lambda: kernel(np.asarray(bounds), *arrays, **scratch), kernels.CONSUMERS + 1)
    return RUN
