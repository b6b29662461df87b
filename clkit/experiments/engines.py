"""Where calls are computed: here in turn, by processes of this machine, or by the workers of a Dask or Ray cluster.

joblib's configuration chooses. An engine takes packed calls by number and gives back, as soon as it is known, what
became of each: `Found`, or the exception that tells how its worker died. A call whose worker died is tried once more
when all others have finished, alone, so that one that kills its worker harms none but itself.
"""

import copyreg
import functools
import io
import pickle
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, cast
from uuid import uuid4

import cloudpickle
import joblib
import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from clkit.store import local_modules

LARGE = 2**12  # bytes of a tensor that travels by itself, once to each worker
CONTEXT = 2**30  # bytes of a GPU that a process takes for itself
ROOM = 0.8  # share of a GPU's free memory that calls may take: some need more than the first
HERE = uuid4().hex  # this process, among those of all machines
Call = Callable[[], Any]


class Found(NamedTuple):
    """What a call gave, or else its error as text."""

    value: Any
    error: str = ""


Ended = Iterator[tuple[int, Found | Exception]]


def compute(calls: Sequence[Call], jobs: int | None, device: torch.device) -> Iterator[tuple[int, Found]]:
    """What becomes of calls, by their numbers, each as soon as it has finished; several at once, by default one a core.

    With threads they take turns, since torch's generators belong to the process. On a GPU of this machine, unless
    `jobs` or joblib's configuration says how many, the first runs alone and here. Then as many run as fit beside each
    other if each takes the memory that it took at most, one a core.
    """
    backend, configured = _backend()
    count = jobs or (None if configured in (None, 1) else configured)
    waiting = dict(enumerate(calls))
    if engine := on_cluster():
        yield from _sent(functools.partial(engine, backend), waiting)
        return
    if device.type == "cuda" and count is None:
        count = 1
        if len(waiting) > 1:
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats(device)
            yield 0, attempted(waiting.pop(0))
            most = torch.cuda.max_memory_reserved(device) + CONTEXT
            torch.cuda.empty_cache()
            fitting = int(ROOM * torch.cuda.mem_get_info(device)[0] / most)
            count = max(1, min(fitting, joblib.cpu_count()))
    count = joblib.effective_n_jobs(count or -1)
    if count == 1 or getattr(backend, "uses_threads", False):
        yield from ((number, attempted(call)) for number, call in waiting.items())
    else:
        yield from _sent(functools.partial(_processes, backend, count), waiting)


def on_cluster() -> Callable[..., Ended] | None:
    """The engine of the cluster that joblib is configured for, whose machines may be other ones than this, if any."""
    return {"DaskDistributedBackend": _dask, "RayBackend": _ray}.get(type(_backend()[0]).__name__)


def attempted(call: Call) -> Found:
    """What a call gives; an error as text, whatever it is, unless someone stops the work."""
    try:
        return Found(call())
    except KeyboardInterrupt:
        raise
    except BaseException:  # what ends one call must not end the others
        return Found(None, traceback.format_exc())


class Post:
    """Packs calls for the way to other processes, which may not find their modules by themselves; never as a file.

    Functions of notebooks and scripts go along whole; of modules the folders do, of all that this process imports from.
    The memory of tensors on the CPU goes along once, whatever views it has; where it is large, beside the call, as an
    array that cannot be written to.
    """

    def __init__(self) -> None:
        self.folders = [str(Path(folder).absolute()) for folder in sys.path]  # "" is the working folder
        self.versions = local_modules()
        self.seen: dict[tuple[int, int], Memory] = {}

    def pack(self, call: Call) -> "Packed":
        """A call's parcel and the arrays that go with it."""
        file = io.BytesIO()
        packer = _Packer(file, self.seen)
        packer.dump(call)
        return Packed(Parcel(file.getvalue(), self.folders, self.versions), packer.arrays)


@dataclass(frozen=True, eq=False)
class Parcel:
    """A packed call, where it came from, and the versions there of all modules of one's own."""

    content: bytes
    folders: list[str]
    versions: dict[str, str]
    origin: str = HERE

    def open(self, arrays: Sequence[np.ndarray]) -> Call:
        """The call again, in any process; its tensors share the arrays' memory where that may be written to.

        What this process imported for an earlier parcel, and is another version now, is imported anew.
        """
        if self.origin != HERE:
            sys.path += [folder for folder in self.folders if folder not in sys.path]
            if any(MET.get(name, version) != version for name, version in self.versions.items()):
                for name in MET.keys() & self.versions.keys():
                    del MET[name]
                    sys.modules.pop(name, None)
        call = _Unpacker(io.BytesIO(self.content), arrays).load()
        if self.origin != HERE:
            MET.update({name: version for name, version in local_modules().items() if name in self.versions})
        return call


class Packed(NamedTuple):
    """A call on its way."""

    parcel: Parcel
    arrays: Sequence[np.ndarray]


WORK = threading.RLock()  # held by the thread of a worker that computes; a call may have threads that run something
MET: dict[str, str] = {}  # versions of modules as they were when a parcel made this process import them


class Memory(NamedTuple):
    """What tensors lie in, kept alive, and its bytes."""

    storage: torch.UntypedStorage
    array: np.ndarray


class _Packer(cloudpickle.Pickler):  # type: ignore[misc]
    def __init__(self, file: io.BytesIO, seen: dict[tuple[int, int], Memory]) -> None:
        super().__init__(file)
        self.seen = seen
        self.numbers: dict[tuple[int, int], int] = {}
        self.arrays: list[np.ndarray] = []

    def persistent_id(self, obj: Any) -> Any:
        """Of a tensor's memory: its number in this parcel, its dtype, and its bytes or the number of its array."""
        storage = obj._untyped_storage if isinstance(obj, torch.storage.TypedStorage) else obj
        if not isinstance(storage, torch.UntypedStorage) or storage.device.type != "cpu" or not storage.nbytes():
            return None
        place, dtype = (storage.data_ptr(), storage.nbytes()), getattr(obj, "dtype", None)
        if place not in self.seen:
            array = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            array.flags.writeable = False  # workers may share what arrives
            self.seen[place] = Memory(storage, array)
        content = None
        if place not in self.numbers:
            self.numbers[place], array = len(self.numbers), self.seen[place].array
            content = array.tobytes() if len(array) < LARGE else len(self.arrays)
            self.arrays += [array] if len(array) >= LARGE else []
        return self.numbers[place], dtype, content

    def reducer_override(self, obj: Any) -> Any:
        """What cloudpickle cannot pack, or not as it was.

        Modules of a kind of their own go by name: `torch.classes`, which comes along with a name such as classes.
        Cached functions and properties go with their function, parametrised networks with their attributes. Code keeps
        the name of its file and classes the whole of theirs: a description is then the same on both sides.
        """
        if isinstance(obj, types.ModuleType) and type(obj) is not types.ModuleType:
            if (name := getattr(obj, "__name__", "")) in sys.modules:
                return import_module, (name,)
        if isinstance(obj, functools._lru_cache_wrapper) and (obj.__module__ == "__main__" or "." in obj.__qualname__):
            return _cached, (obj.__wrapped__, obj.cache_parameters())
        if type(obj) is functools.cached_property:
            return functools.cached_property, (obj.func,), {"attrname": obj.attrname}
        if isinstance(obj, types.CodeType):
            make, parts = cast(Any, self.dispatch_table[types.CodeType](obj))
            return make, tuple(obj.co_filename if part == "<dynamic-code>" else part for part in parts)
        if type(obj).__module__ == parametrize.__name__ and isinstance(obj, nn.Module):
            return copyreg.__newobj__, (type(obj),), vars(obj)  # type: ignore[attr-defined]
        made = super().reducer_override(obj)
        if isinstance(obj, type) and isinstance(made, tuple) and len(made) == 6:
            made[2][0]["__qualname__"] = obj.__qualname__
        return made


def _cached(function: Callable[..., Any], options: dict[str, Any]) -> Any:
    return functools.lru_cache(**options)(function)


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, arrays: Sequence[np.ndarray]) -> None:
        super().__init__(file)
        self.arrays = arrays
        self.storages: dict[int, torch.UntypedStorage] = {}

    def persistent_load(self, pid: tuple[int, torch.dtype | None, Any]) -> torch.storage.TypedStorage:
        number, dtype, content = pid
        if number not in self.storages:
            rows = np.frombuffer(content, np.uint8) if isinstance(content, bytes) else self.arrays[content]
            array = np.require(np.asarray(rows), requirements="W")
            self.storages[number] = torch.from_numpy(array).untyped_storage()
        return torch.storage.TypedStorage(
            wrap_storage=self.storages[number], dtype=dtype or torch.uint8, _internal=True
        )


def _opened(parcel: Parcel, *arrays: np.ndarray) -> Found:
    """What the call in a parcel gives, on a worker, whose threads take turns."""
    with WORK:
        return attempted(lambda: parcel.open(arrays)())


def _backend() -> tuple[Any, int | None]:
    """joblib's active backend, and for how many jobs it is configured."""
    return cast(tuple[Any, int | None], joblib.parallel.get_active_backend())


def _sent(engine: Callable[[Mapping[int, Packed]], Ended], calls: Mapping[int, Call]) -> Iterator[tuple[int, Found]]:
    """What an engine finds for calls, and in the end again, one by one, for those whose worker died."""
    post, waiting, suspects = Post(), dict[int, Packed](), dict[int, Packed]()
    for number, call in calls.items():
        found = attempted(functools.partial(post.pack, call))
        if found.error:
            yield number, found
        else:
            waiting[number] = found.value
    while waiting:
        for number, found in engine(dict(waiting)):
            packed = waiting.pop(number)
            if isinstance(found, Found):
                yield number, found
            else:
                suspects[number] = packed
    for number, packed in suspects.items():
        for _, found in engine({number: packed}):
            if isinstance(found, Exception):
                told = " ".join(str(found).split())
                found = Found(
                    None, f"no worker lived to finish it, not even alone: {type(found).__name__}: {told:.400}"
                )
            yield number, found


def _processes(backend: Any, count: int, calls: Mapping[int, Packed]) -> Ended:
    """joblib's configured backend, with `count` workers; when one dies, all that are at work come back as dead.

    These are the first that have no result, since workers take calls in turn. The others are not begun and not told of.
    In place of "multiprocessing", which waits for ever for a call whose worker died, stands loky.
    """
    instead = {"backend": "loky"} if type(backend).__name__ == "MultiprocessingBackend" else {}
    ready = "generator_unordered" if instead or backend.supports_return_generator else "list"
    options: dict[str, Any] = {"n_jobs": max(2, count), "batch_size": 1, "return_as": ready, "mmap_mode": "c"}
    work = (joblib.delayed(_numbered)(number, parcel, *arrays) for number, (parcel, arrays) in calls.items())
    waiting = list(calls)
    try:
        for number, found in cast(Any, joblib.Parallel(**options, **instead)(work)):
            waiting.remove(number)
            yield number, found
    except Exception as error:
        yield from [(number, error) for number in waiting[:count]]


def _numbered(number: int, parcel: Parcel, *arrays: np.ndarray) -> tuple[int, Found]:
    return number, _opened(parcel, *arrays)


def _dask(backend: Any, calls: Mapping[int, Packed]) -> Ended:
    """The Dask cluster of joblib's backend. Not by joblib itself: that waits for ever for one whose worker died.

    An array is a task of its own, which the scheduler knows whole: it goes once to a worker, and survives workers.
    """
    from dask import config
    from distributed import as_completed

    client, numbers = backend.client, dict[Any, int]()
    place = _once(lambda array: client.submit(_itself, array, key=f"array-{uuid4().hex}"))
    try:
        with config.set({"distributed.admin.large-graph-warning-threshold": "1 TB"}):
            for number, (parcel, arrays) in calls.items():
                options = {"key": f"run-{number}-{uuid4().hex}", **backend.submit_kwargs}
                numbers[client.submit(_opened, parcel, *map(place, arrays), **options)] = number
        for future in as_completed(list(numbers)):
            try:
                found = future.result()
            except Exception as error:
                found = error
            if client.status != "running":
                raise ConnectionError("the Dask cluster is gone; what finished is stored, sweep again to go on")
            yield numbers.pop(future), found
    finally:
        if client.status == "running":
            client.cancel(list(numbers))


def _itself(array: np.ndarray) -> np.ndarray:
    return array


def _once(send: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray], Any]:
    """Sends an array when it is first met; gives where it is every time."""
    sent: dict[int, Any] = {}

    def place(array: np.ndarray) -> Any:
        if id(array) not in sent:
            sent[id(array)] = send(array)
        return sent[id(array)]

    return place


def _ray(backend: Any, calls: Mapping[int, Packed]) -> Ended:
    """The Ray cluster: a task a call, an object a large array; not by joblib's pool, which gives all at the end."""
    ray: Any = import_module("ray")
    remote = ray.remote(max_retries=0, **(backend.ray_remote_args or {}))(_opened)
    place, numbers = _once(ray.put), dict[Any, int]()
    try:
        for number, (parcel, arrays) in calls.items():
            numbers[remote.remote(parcel, *map(place, arrays))] = number
        while numbers:
            [done], _ = ray.wait(list(numbers))
            try:
                found = ray.get(done)
            except ray.exceptions.RayError as error:
                found = error
            yield numbers.pop(done), found
    finally:
        for task in numbers:
            ray.cancel(task)
