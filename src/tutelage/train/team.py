"""Several processes in one training step: shares of rows, sums, wrapping, whole weights.

Every rank must come to each of these in the same order. A process alone goes through the same
calls, which then do nothing. Device neutral: torch names the backend of a device, and plain
numbers and decisions travel over the CPU's.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore  # type: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from tutelage.core.errors import EngineError
from tutelage.core.team import Team, TeammateLost
from tutelage.models.device import pick_device
from tutelage.models.load import backbone_and_head

Item = TypeVar("Item")
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")
_GONE = ("connection", "peer", "broken pipe", "timed out")


def opened(team: Team, *, device: str) -> Team:
    """Connect to the team's store, and take this rank's device.

    The place is taken out of the environment: libraries that look for it there, and processes that
    a step starts, would join on their own.
    """
    chosen = pick_device(device)
    if chosen.type != "cpu":
        torch.accelerator.set_device_index(team.local_rank)
    team.store, _, _ = next(rendezvous("env://"))
    for name in [*_PLACE, *(name for name in os.environ if name.startswith("ACCELERATE_"))]:
        os.environ.pop(name, None)
    return team


class Joined:
    """The processes of a team within one training step; see `joined`."""

    def __init__(self, team: Team, device: torch.device) -> None:
        self.team, self.device = team, device
        self._texts = 0

    @property
    def alone(self) -> bool:
        """Whether there is but this process."""
        return self.team.size == 1

    @property
    def leads(self) -> bool:
        """Whether this process writes and reports."""
        return self.team.leads

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This rank's part: every size-th, so that no item has two and none is left out."""
        return items[self.team.rank :: self.team.size]

    def most(self, count: int) -> int:
        """Items of the largest share of `count`."""
        return -(-count // self.team.size)

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each value added over the ranks, in float64: counts stay exact."""
        if self.alone:
            return list(values)
        together = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(together)
        return together.tolist()

    def decided(self, yes: bool) -> bool:
        """Rank 0's answer, for what must not differ between ranks, such as by their clocks."""
        return self.sums([float(yes and self.leads)])[0] > 0

    def texts(self, text: str) -> list[str]:
        """What each rank gives, by rank. Through the store: rare, and of any length."""
        if self.alone:
            return [text]
        self._texts += 1
        key = f"text-{self.team.trainings}-{self._texts}"
        self.team.store.set(f"{key}-{self.team.rank}", json.dumps(text))
        return [json.loads(self.team.store.get(f"{key}-{rank}")) for rank in range(self.team.size)]

    def wrap(self, trainee: nn.Module, model: nn.Module) -> nn.Module:
        """The module whose forward and backward meet the other ranks'.

        Under FSDP2 the parameters of `model` become shards, one group a decoder layer.
        """
        if self.alone:
            return trainee
        if self.team.sharding == "ddp":
            return DistributedDataParallel(trainee, gradient_as_bucket_view=True)
        mesh = init_device_mesh(self.device.type, (self.team.size,))
        for layer in _layers(backbone_and_head(model).backbone):
            fully_shard(layer, mesh=mesh)
        fully_shard(trainee, mesh=mesh)
        return trainee

    @contextlib.contextmanager
    def gathering(self, trainee: nn.Module, *, last: bool) -> Iterator[None]:
        """A forward and backward of a step; replicas meet in the last one only, shards always.

        Shards would have to keep whole gradients between the passes.
        """
        with (
            trainee.no_sync()
            if isinstance(trainee, DistributedDataParallel) and not last
            else (contextlib.nullcontext())
        ):
            yield

    @contextlib.contextmanager
    def readable(self, trainee: nn.Module) -> Iterator[None]:
        """While the model is read past `trainee`'s own forward: what no layer owns is whole then.

        The layers see to themselves.
        """
        if not isinstance(trainee, FSDPModule):
            yield
            return
        trainee.unshard()
        yield
        trainee.reshard()

    def release(self, model: nn.Module) -> None:
        """Make the sharded parameters of a trained model plain again: whole at rank 0, on the CPU;
        empty elsewhere, where nothing is saved."""
        found: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if isinstance(parameter, DTensor):
                    if id(parameter) not in found:  # a tied one is one again
                        values = whole(parameter).cpu()
                        values = values if self.leads else values.new_empty(0)
                        found[id(parameter)] = nn.Parameter(values, parameter.requires_grad)
                    setattr(module, name, found[id(parameter)])


@contextlib.contextmanager
def joined(team: Team, device: torch.device) -> Iterator[Joined]:
    """A process group for one training step.

    Raises TeammateLost where another process has ended.
    """
    if team.size == 1:
        yield Joined(team, device)
        return
    team.trainings += 1
    backends = ",".join(
        f"{kind}:{dist.get_default_backend_for_device(kind)}"
        for kind in sorted({"cpu", device.type})
    )
    try:
        dist.init_process_group(
            backends, rank=team.rank, world_size=team.size,
            store=PrefixStore(f"training-{team.trainings}", team.store),
        )  # fmt: skip
        yield Joined(team, device)
        dist.destroy_process_group()
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(
            word in str(error).lower() for word in _GONE
        ):
            raise
        raise TeammateLost(
            f"another of the {team.size} processes has ended (out of memory?), as process "
            f"{team.rank} found out; run again: it goes on from the last checkpoint"
        ) from error


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all of its shards; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(values: Tensor, parameter: Tensor) -> Tensor:
    """`values`, which are whole, as `parameter` is: on its device, and this rank's shard of it."""
    moved = values.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return moved
    return distribute_tensor(moved, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _layers(backbone: nn.Module) -> Sequence[nn.Module]:
    """The decoder layers: the longest list of modules that a backbone has."""
    lists = [module for module in backbone.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise EngineError(
            f"{type(backbone).__name__} has no list of layers to shard; set runtime.sharding = ddp"
        )
    return list(max(lists, key=len))
