"""`Program`: compiled functions one after another on all of torch's threads, in one start.

    threads   function 0 | barrier | function 1 | barrier | ...

Each function shares its items among the threads, as one that `parallel.run` calls. A layer is some
ten of them; started one by one, the other threads wait for Python between each two, and go to
sleep. At a barrier a thread spins, and gives its processor away after `_SPINS` turns.
"""

import ctypes
from collections.abc import Mapping

import numpy as np
import torch
from numba import carray, types

from tokenmill.kernels.compiler import compiled
from tokenmill.kernels.parallel import Call, count_threads, start
from tokenmill.kernels.vectors import arrive, ask, call, cycles, int64s, pause, seen

#: Turns of a barrier before a thread yields, some 20 us.
_SPINS = 400
#: Of a call: its counters, which are 0 when it begins.
_COUNTERS = 2


@compiled(types.void(types.int64))
def _team(data):
    given = carray(int64s(data), (6,))
    num_calls, calls_at, ask_threads, give_way = given[1], given[2], given[3], given[4]
    calls = carray(int64s(calls_at), (num_calls, 2))
    ends = carray(int64s(given[5]), (num_calls + 1,))
    num_threads = ask(ask_threads) if ask_threads else 1
    ends[0] = cycles()
    for number in range(num_calls):
        call(calls[number, 0], calls[number, 1])
        arrive(data)
        spins = 0
        while seen(data) < (number + 1) * num_threads:
            spins += 1
            if spins < _SPINS:
                pause()
            else:
                ask(give_way)
        ends[number + 1] = cycles()  # of all threads, the last to leave


class Program:
    """Calls in order. Whoever makes it keeps the memory that their arguments name."""

    def __init__(self, calls: list[Call]) -> None:
        packed = [np.frombuffer(one.packed(), dtype=np.int64) for one in calls]
        begins = np.cumsum([0, *map(len, packed)])
        self._words = np.concatenate(packed)
        self._counters = (begins[:-1, None] + np.arange(_COUNTERS)).ravel()
        places: dict[str, list[int]] = {}
        for begin, one in zip(begins.tolist(), calls, strict=False):
            for place, argument in enumerate(one.arguments, begin + _COUNTERS + 1):
                if isinstance(argument, str):
                    places.setdefault(argument, []).append(place)
        self._places = {name: np.array(of_name) for name, of_name in places.items()}
        at = self._words.ctypes.data
        functions = [one.function.address for one in calls]
        self._calls = np.stack([np.array(functions), at + 8 * begins[:-1]], axis=1)
        give_way = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value
        self._ends = np.zeros(len(calls) + 1, dtype=np.int64)
        addresses = [self._calls.ctypes.data, count_threads(), give_way, self._ends.ctypes.data]
        self._team = np.array([0, len(calls), *addresses], dtype=np.int64)

    def run(self, values: Mapping[str, int]) -> None:
        """Call all of them, with these numbers where their arguments have names.

        Raises:
            KeyError: a name that no argument has.
        """
        words = self._words
        words[self._counters] = 0
        for name, value in values.items():
            words[self._places[name]] = value
        self._team[0] = 0
        start(_team, self._team.ctypes.data, torch.get_num_threads())

    def counted(self, number: int) -> int:
        """The first counter of a call, as its function has left it."""
        return int(self._words[self._counters[_COUNTERS * number]])

    def shares(self) -> list[float]:
        """Of the last run's time, the share of each call."""
        taken = np.diff(self._ends)
        return [float(share) for share in taken / taken.sum()]
