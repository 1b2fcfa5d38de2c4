"""The learning rate of each step, by schedule, and the optimizer's groups."""

import itertools

import pytest
import torch
from torch import nn

from tutelage.recipe.training import Sft
from tutelage.train.optim import adamw, has_fused, rate


def config(**settings: object) -> Sft:
    values = {"stage": "sft", "model": "m", "data": ("d",), "seed": 0, "lr": 2.0} | settings
    return Sft.model_validate(values)


def rates(steps: int, **settings: object) -> list[float]:
    return [rate(step, steps=steps, config=config(**settings)) for step in range(steps)]


def test_the_rate_warms_up_then_falls_along_a_cosine_to_its_share() -> None:
    found = rates(101)
    assert found[:6] == pytest.approx([2 / 6, 4 / 6, 1.0, 8 / 6, 10 / 6, 2.0])
    assert all(a > b for a, b in itertools.pairwise(found[6:]))
    assert found[53] == pytest.approx(2.0 * 0.55, abs=0.02)  # half way down: (1 + 0.1) / 2
    assert found[100] == pytest.approx(0.2)


def test_wsd_stays_level_and_decays_over_its_last_share() -> None:
    found = rates(101, lr_schedule="wsd", decay_share=0.25, min_lr_share=0.0)
    assert found[:6] == pytest.approx([2 / 6, 4 / 6, 1.0, 8 / 6, 10 / 6, 2.0])
    assert found[6:76] == [2.0] * 70
    assert all(a > b for a, b in itertools.pairwise(found[75:]))
    assert found[81] == pytest.approx(2.0 * (1 - (6 / 25) ** 0.5))
    assert found[100] == 0.0


def test_constant_stays_level_after_the_warm_up() -> None:
    assert rates(20, lr_schedule="constant", warmup_share=0.1) == [1.0, *[2.0] * 19]


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
def test_one_step_without_warm_up_has_the_whole_rate(name: str) -> None:
    assert rates(1, lr_schedule=name, warmup_share=0.0) == [2.0]


@pytest.mark.parametrize("steps", [2, 3, 7])
def test_the_last_step_of_a_short_wsd_has_the_least_rate(steps: int) -> None:
    assert rates(steps, lr_schedule="wsd", warmup_share=0.0)[-1] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"decay_share": 0.1}, "decay_share is a setting of lr_schedule = 'wsd'"),
        ({"lr_schedule": "wsd", "warmup_share": 0.6, "decay_share": 0.5}, "sum to more than 1"),
        ({"lr_schedule": "linear"}, "lr_schedule"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config(**settings)


def test_the_optimizer_decays_matrices_alone_and_is_fused_where_it_can_be() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    optimizer = adamw(model, lr=0.5, weight_decay=0.25)
    assert [[p.ndim for p in group["params"]] for group in optimizer.param_groups] == [
        [2], [1, 1, 1],
    ]  # fmt: skip
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.0]
    assert optimizer.defaults["fused"]
    assert has_fused(torch.device("cpu"))
    assert not has_fused(torch.device("meta"))  # stands for a device without such a kernel


def test_a_fused_step_is_adamws_own_formula() -> None:
    torch.manual_seed(0)
    models = [nn.Linear(5, 7).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours = adamw(models[0], lr=0.1, weight_decay=0.3)
    plain = torch.optim.AdamW(
        [{"params": [models[1].weight], "weight_decay": 0.3},
         {"params": [models[1].bias], "weight_decay": 0.0}],
        lr=0.1, betas=(0.9, 0.95), foreach=False, fused=False,
    )  # fmt: skip
    for _ in range(5):
        inputs = torch.randn(4, 5, dtype=torch.float64)
        for model, optimizer in zip(models, (ours, plain), strict=True):
            model(inputs).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(models[0].weight, models[1].weight, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(models[0].bias, models[1].bias, rtol=1e-10, atol=1e-12)
