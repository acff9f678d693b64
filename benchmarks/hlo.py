"""What a compiled program does, read from its text: kernels, reads of an argument, collectives."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

Path = tuple[int, ...]  # where in a tuple an array is; () where there is no tuple

CONTROL = ("while", "conditional", "call")  # run other computations
NAMES = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier")
FREE = frozenset((*CONTROL, *NAMES, "after-all", "partition-id", "replica-id"))  # launch no kernel
LATER = ("-update", "-done")  # what an asynchronous operation is waited for by
SAME = ("bitcast", "opt-barrier")  # hand their operand on as it is
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_KIND = re.compile(r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-[a-z]+)(-start)?$")
_CALLED = re.compile(r"(?:body|condition|to_apply|(?:true|false)_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_BYTES = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")


class Instruction(NamedTuple):
    """One line of a computation; `rest` has its attributes."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str


class Computation(NamedTuple):
    """A block of instructions, and the users of each."""

    instructions: dict[str, Instruction]
    users: dict[str, list[Instruction]]
    root: str

    @property
    def parameters(self) -> dict[int, str]:
        """The names of the parameters, by number."""
        found = (x for x in self.instructions.values() if x.opcode == "parameter")
        return {int(x.rest.partition(")")[0]): x.name for x in found}


class Module(NamedTuple):
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str


class Collective(NamedTuple):
    """An exchange between devices.

    Attributes:
      kind: such as `all-reduce`.
      operands: arrays exchanged together.
      nbytes: of what a device holds when it is done.
      devices: that exchange with each other.
      integer: whether counts are exchanged, and not norms.
      where: `entry`, `loop` or `branch`.
    """

    kind: str
    operands: int
    nbytes: int
    devices: int
    integer: bool
    where: str


def parse(compiled: Any) -> Module:
    """The program of `jax.jit(...).lower(...).compile()`."""
    computations: dict[str, Computation] = {}
    current, entry = Computation({}, {}, ""), ""
    for line in compiled.as_text().splitlines():
        if head := _HEAD.match(line):
            current = computations[head[2]] = Computation({}, {}, "")
            entry = head[2] if head[1] else entry
        elif found := _LINE.match(line):
            root, name, shape, opcode, rest = found.groups()
            inner, rest = _closed(rest)
            # Older versions write the shape before each operand.
            operands = tuple(re.findall(r"%([\w.\-]+)", inner)) if opcode != "parameter" else ()
            rest = f"{inner}){rest}" if opcode == "parameter" else rest
            one = current.instructions[name] = Instruction(name, shape, opcode, operands, rest)
            for operand in dict.fromkeys(operands):
                current.users.setdefault(operand, []).append(one)
            if root:
                last = next(reversed(computations))
                current = computations[last] = current._replace(root=name)
    return Module(computations, entry)


def _closed(text: str) -> tuple[str, str]:
    """What stands before the bracket that closes the operands, and what stands behind."""
    depth = 1
    for bracket in re.finditer(r"[()]", text):
        depth += 1 if bracket[0] == "(" else -1
        if not depth:
            return text[: bracket.start()], text[bracket.end() :]
    return text, ""


def _called(one: Instruction) -> list[str]:
    """The computations that an instruction runs, in the order of their operands for a conditional."""
    if branches := _BRANCHES.search(one.rest):
        return re.findall(r"[\w.\-]+", branches[1])
    return _CALLED.findall(one.rest)


def running(module: Module) -> Iterator[tuple[Instruction, str]]:
    """What runs on its own, with `entry`, `loop` or `branch`; a branch counts though it may not be taken."""
    waiting, seen = [(module.entry, "entry")], set()
    while waiting:
        name, where = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for one in module.computations[name].instructions.values():
            yield one, where
            if one.opcode in CONTROL:
                inner = {"while": "loop", "conditional": "branch"}.get(one.opcode, where)
                waiting += [(callee, "branch" if where == "branch" else inner) for callee in _called(one)]


def launches(module: Module, computation: str | None = None) -> int:
    """How many instructions run as kernels of their own in an ordinary call.

    Each loop counts once, of a conditional the longest branch, and of what is asynchronous the start. What a
    backend makes of an instruction, one launch or several, its text does not say.
    """
    count = 0
    for one in module.computations[computation or module.entry].instructions.values():
        inner = [launches(module, name) for name in _called(one)] if one.opcode in CONTROL else [0]
        count += max(inner) if one.opcode == "conditional" else sum(inner)
        count += one.opcode not in FREE and not one.opcode.endswith(LATER)
    return count


def arguments(module: Module, prefix: str) -> list[str]:
    """The parameters of the program that stand for leaves of the arguments whose names start so."""
    entry = module.computations[module.entry]
    found = (entry.instructions[name] for _, name in sorted(entry.parameters.items()))
    return [one.name for one in found if f'op_name="{prefix}' in one.rest]


def reads(module: Module, parameter: str) -> dict[str, set[str]]:
    """Which kernels read a parameter of the program, by `entry`, `loop` or `branch`.

    The argument is followed through tuples, loops, branches and calls. A kernel that needs it twice reads it
    once; one in a loop counts once, however often the loop runs.
    """
    found: dict[str, set[str]] = {"entry": set(), "loop": set(), "branch": set()}
    _follow(module, module.entry, parameter, (), "entry", found)
    return found


def _follow(module: Module, inside: str, name: str, path: Path, where: str, found: dict[str, set[str]]):
    for user in module.computations[inside].users.get(name, ()):
        places = [k for k, operand in enumerate(user.operands) if operand == name]
        if user.opcode == "tuple":
            for k in places:
                _follow(module, inside, user.name, (k, *path), where, found)
        elif user.opcode == "get-tuple-element":
            if path[0] == int(re.search(r"index=(\d+)", user.rest)[1]):  # pyright: ignore[reportOptionalSubscript]
                _follow(module, inside, user.name, path[1:], where, found)
        elif user.opcode in SAME:
            _follow(module, inside, user.name, path, where, found)
        elif user.opcode in CONTROL:
            inner = {"while": "loop", "conditional": "branch"}.get(user.opcode, where)
            for callee, k in _entered(user, places):
                argument = module.computations[callee].parameters[k]
                _follow(module, callee, argument, path, "branch" if where == "branch" else inner, found)
            if user.opcode == "while":  # what a loop hands on unchanged comes out of it
                _follow(module, inside, user.name, path, where, found)
        else:
            found[where].add(f"{inside}/{user.name}")


def _entered(user: Instruction, places: list[int]) -> Iterator[tuple[str, int]]:
    """The computations that an operand goes to, and as which parameter."""
    for number, callee in enumerate(_called(user)):
        if user.opcode == "while":
            yield callee, 0
        elif user.opcode == "call":
            yield from ((callee, k) for k in places)
        elif number + 1 in places:  # the first operand of a conditional is what decides
            yield callee, 0


def collectives(module: Module) -> list[Collective]:
    """The exchanges between devices; of an asynchronous one its start."""
    found = []
    for one, where in running(module):
        if kind := _KIND.match(one.opcode):
            arrays = _BYTES.findall(one.shape)
            nbytes = sum(_nbytes(bits, shape) for _, bits, shape in arrays)
            integer = all(letters != "f" and letters != "bf" for letters, _, _ in arrays)
            head = kind[1], len(one.operands), nbytes, _devices(one.rest)
            found.append(Collective(*head, integer, where))
    return found


def _nbytes(bits: str, shape: str) -> int:
    return math.prod(int(n) for n in shape.split(",") if n) * max(int(bits or 8) // 8, 1)


def _devices(rest: str) -> int:
    """How many devices each replica group has: 0 where the text does not say."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", rest):
        sizes: Mapping[str, str] = dict(re.findall(r"'?(\w+)'?=(\d+)", mesh[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return listed[1].count(",") + 1
    return 0
