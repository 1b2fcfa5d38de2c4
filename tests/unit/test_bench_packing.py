"""The packing bench on a tiny model: every way it times learns the same from the same examples."""

import numpy as np
import pytest
import torch
from tiny import write_model

from tutelage.bench import packing
from tutelage.models.load import load_model
from tutelage.train.batches import Example
from tutelage.train.loop import Trainee
from tutelage.train.objectives import CrossEntropy

LENGTHS = (30, 9, 64, 12, 2, 41)


@pytest.fixture(scope="module")
def trainee(tmp_path_factory: pytest.TempPathFactory) -> Trainee:
    folder = write_model(tmp_path_factory.mktemp("model"))
    model = load_model(folder, dtype="float32", device=torch.device("cpu"))
    return Trainee(model, CrossEntropy()).train()


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    random = np.random.default_rng(0)
    return [
        Example(random.integers(0, 300, length).astype(np.int32), np.arange(length) > length // 3)
        for length in LENGTHS
    ]


@pytest.mark.parametrize("way", packing.WAYS)
def test_every_way_has_the_gradient_of_padded_batches(
    trainee: Trainee, examples: list[Example], way: str
) -> None:
    found = []
    for each in (packing.PADDED, way):
        trainee.zero_grad()
        packing._step(trainee, each, examples, 64)
        found.append(
            {n: p.grad.clone() for n, p in trainee.named_parameters() if p.grad is not None}
        )
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5)


def test_a_table_has_useful_tokens_and_both_ratios(
    trainee: Trainee, examples: list[Example]
) -> None:
    rounds = packing._rounds(examples, 100, 2)
    assert all(sum(len(one.ids_L) for one in given) >= 100 for given in rounds)
    lines = packing._measure(trainee, "some", rounds, 64, packing.WAYS, lambda: None)
    assert [line.way for line in lines] == list(packing.WAYS)
    by_way = {line.way: line for line in lines}
    assert by_way[packing.PADDED].to_padded == by_way[packing.MASKED].to_masked == 1
    packed = by_way[packing.PACKED]
    ratio = packed.tokens_s / by_way[packing.PADDED].tokens_s  # one round: its own median
    assert packed.to_padded == pytest.approx(ratio)
