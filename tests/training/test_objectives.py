"""Objectives: draws that do not depend on workers, losses against their formulas, phases, options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from training import flow
from training.linear_dit import LinearDiT, LinearDiTConfig
from training.objectives import Objective, Phase, Randomness, TrainingBatch, build_objective
from training.objectives.flow_matching import FlowMatching
from training.objectives.progressive import ProgressiveDistillation
from training.samplers import euler, field_of, flow_dpm_solver, sigma_grid


def batch_of(count: int = 6, start: int = 0) -> TrainingBatch:
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(16, 48, 4, 4, generator=generator), torch.randn(16, 5, 64, generator=generator)
    mask = (torch.arange(5) < torch.arange(16)[:, None] % 5 + 1).long()
    null_text = torch.randn(5, 64, generator=generator)
    rows = slice(start, start + count)
    return TrainingBatch(
        latents[rows],
        text[rows],
        mask[rows],
        torch.arange(start, start + count),
        null_text,
        torch.tensor([1, 0, 0, 0, 0]),
    )


def network(seed: int = 0, **changes) -> LinearDiT:
    torch.manual_seed(seed)
    return LinearDiT(LinearDiTConfig.named("tiny", num_layers=1, **changes))


class TestRandomness:
    def test_split_batches_draw_what_the_whole_draws(self):
        whole = Randomness(5, 7, range(8))
        for split in ([range(4), range(4, 8)], [range(0, 8, 2), range(1, 8, 2)]):
            for part in split:
                mine = Randomness(5, 7, torch.tensor(list(part)))
                for name in ("normal", "uniform"):
                    expected = getattr(whole, name)("noise", 2, 3)[list(part)]
                    assert torch.equal(getattr(mine, name)("noise", 2, 3), expected)
                assert mine.shared_uniform("step") == whole.shared_uniform("step")

    def test_seed_step_place_and_label_each_make_another_stream(self):
        draws = [
            Randomness(seed, step, [place]).normal(label, 4)
            for seed, step, place, label in (
                (0, 0, 0, "a"),
                (1, 0, 0, "a"),
                (0, 1, 0, "a"),
                (0, 0, 1, "a"),
                (0, 0, 0, "b"),
            )
        ]
        assert all(not torch.equal(draws[0], other) for other in draws[1:])

    def test_distributions(self):
        randomness = Randomness(0, 0, range(4000))
        normal, uniform = randomness.normal("x"), randomness.uniform("x")
        assert abs(float(normal.mean())) < 0.06
        assert float(normal.std()) == pytest.approx(1, abs=0.05)
        assert float(uniform.mean()) == pytest.approx(0.5, abs=0.02)
        counts = torch.bincount(randomness.integers("i", below=4), minlength=4)
        assert len(counts) == 4
        assert int(counts.min()) > 900


class TestFlowMatching:
    def test_loss_is_the_formula(self):
        objective, model, batch = FlowMatching(caption_dropout=0.0), network(), batch_of()
        phase = objective.phase_at(0)
        draw = objective.draw(phase, batch, Randomness(0, 3, batch.position_B))
        loss, metrics = objective.loss(phase, {"model": model}, batch, draw)
        sigma = draw["sigma"][:, None, None, None]
        x = (1 - sigma) * batch.latents_BCHW + sigma * draw["noise"]
        v = model(x, 1000 * draw["sigma"], batch.text_BLC, batch.mask_BL)
        expected = (v - (draw["noise"] - batch.latents_BCHW)).square().mean()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(metrics["flow_loss"], expected.detach())

    def test_two_workers_give_the_loss_and_gradient_of_one(self):
        objective, model = FlowMatching(caption_dropout=0.3), network()
        phase, results = objective.phase_at(0), []
        for parts in ([batch_of(8)], [batch_of(4), batch_of(4, start=4)]):
            model.zero_grad()
            losses = []
            for batch in parts:
                draw = objective.draw(phase, batch, Randomness(0, 3, batch.position_B))
                loss, _ = objective.loss(phase, {"model": model}, batch, draw)
                (loss / len(parts)).backward()
                losses.append(float(loss.detach()) / len(parts))
            results.append((sum(losses), torch.cat([p.grad.flatten() for p in model.parameters()])))
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
        torch.testing.assert_close(results[0][1], results[1][1], atol=1e-6, rtol=1e-4)

    @pytest.mark.parametrize("dropped_mask", ["caption", "null"])
    def test_a_dropped_caption_is_the_null_text(self, dropped_mask):
        objective = FlowMatching(caption_dropout=0.5, dropped_mask=dropped_mask)
        batch, seen = batch_of(12), {}

        class Spy:
            config = LinearDiTConfig.named("tiny")

            def __call__(self, x, time, text, mask, guidance):
                seen.update(text=text, mask=mask)
                return torch.zeros_like(x)

        phase = objective.phase_at(0)
        draw = objective.draw(phase, batch, Randomness(0, 0, batch.position_B))
        objective.loss(phase, {"model": Spy()}, batch, draw)
        dropped = draw["drop"]
        assert 0 < int(dropped.sum()) < 12
        assert torch.equal(seen["text"][dropped], batch.null_text_BLC[dropped])
        assert torch.equal(seen["text"][~dropped], batch.text_BLC[~dropped])
        expected = batch.null_mask_BL if dropped_mask == "null" else batch.mask_BL
        assert torch.equal(seen["mask"][dropped], expected[dropped])
        assert torch.equal(seen["mask"][~dropped], batch.mask_BL[~dropped])


class TestProgressive:
    def test_a_student_of_zero_loss_lands_on_the_teachers_points(self):
        """The target velocities must carry each start exactly to where the teacher's solver ends."""
        objective = ProgressiveDistillation(steps=2, teacher_steps_per_step=3, guidance_scale=3.0)
        teacher, batch, calls = network().eval(), batch_of(4), []

        class Student:
            config = teacher.config

            def __call__(self, x, time, text, mask, guidance):
                calls.append((x, time, text, mask))
                return torch.zeros_like(x)

        phase = objective.phase_at(0)
        draw = objective.draw(phase, batch, Randomness(0, 0, batch.position_B))
        loss, _ = objective.loss(phase, {"student": Student(), "teacher": teacher}, batch, draw)
        ((x, time, text, mask),) = calls
        field = field_of(teacher, batch.text_BLC, batch.mask_BL, batch.null_text_BLC, batch.null_mask_BL, 3.0)
        path = [draw["noise"]]
        with torch.no_grad():
            flow_dpm_solver(field, draw["noise"], sigma_grid(6, 3.0), callback=lambda i, y: path.append(y))
        torch.testing.assert_close(x, torch.cat([path[0], path[3]]), atol=1e-5, rtol=1e-4)
        grid = sigma_grid(2, 3.0)
        assert time.tolist() == [grid.times[0]] * 4 + [grid.times[1]] * 4
        assert torch.equal(text, batch.text_BLC.repeat(2, 1, 1))
        assert torch.equal(mask, batch.mask_BL.repeat(2, 1))
        # With v = 0 the loss is the mean square of the targets; Euler with those targets ends where the teacher ends.
        targets = {
            grid.times[i]: (path[3 * i] - path[3 * i + 3]) / (grid.sigmas[i] - grid.sigmas[i + 1]) for i in range(2)
        }
        assert float(loss) == pytest.approx(float(torch.stack([*targets.values()]).square().mean()), rel=1e-4)
        landed = euler(lambda y, sigma, time: targets[time], draw["noise"], grid)
        torch.testing.assert_close(landed, path[6], atol=1e-5, rtol=1e-4)

    def test_data_states_start_from_noised_images(self):
        objective = ProgressiveDistillation(steps=4, teacher_steps_per_step=2, states="data", guidance_scale=2.0)
        teacher, batch, calls = network().eval(), batch_of(12), []

        class Student:
            config = teacher.config

            def __call__(self, x, time, text, mask, guidance):
                calls.append((x, time))
                return torch.zeros_like(x)

        phase = objective.phase_at(0)
        draw = objective.draw(phase, batch, Randomness(0, 0, batch.position_B))
        loss, _ = objective.loss(phase, {"student": Student(), "teacher": teacher}, batch, draw)
        ((x, time),) = calls
        segment, grid, fine = draw["segment"], sigma_grid(4, 3.0), sigma_grid(8, 3.0)
        assert len(set(segment.tolist())) > 1
        sigma = torch.tensor(grid.sigmas)[segment]
        torch.testing.assert_close(x, flow.noised(batch.latents_BCHW, draw["noise"], sigma))
        assert time.tolist() == [grid.times[i] for i in segment]
        # Each sample against a solver of its own, from its own σ.
        squares = []
        for b, i in enumerate(segment.tolist()):
            part = sigma_grid(8, 3.0)
            cut = type(part)(fine.sigmas[2 * i : 2 * i + 3], fine.times[2 * i : 2 * i + 2])
            one = slice(b, b + 1)
            field = field_of(
                teacher, batch.text_BLC[one], batch.mask_BL[one], batch.null_text_BLC[one], batch.null_mask_BL[one], 2.0
            )
            with torch.no_grad():
                end = flow_dpm_solver(field, x[one], cut)
            squares.append(((x[one] - end) / (grid.sigmas[i] - grid.sigmas[i + 1])).square().mean())
        assert float(loss) == pytest.approx(float(torch.stack(squares).mean()), rel=1e-3)

    def test_gradient_reaches_the_student_alone(self):
        objective = ProgressiveDistillation(steps=2, teacher_steps_per_step=2)
        teacher, student, batch = network(0), network(1), batch_of(3)
        phase = objective.phase_at(0)
        draw = objective.draw(phase, batch, Randomness(0, 0, batch.position_B))
        loss, _ = objective.loss(phase, {"student": student, "teacher": teacher}, batch, draw)
        loss.backward()
        assert all(parameter.grad is None for parameter in teacher.parameters())
        assert all(parameter.grad is not None for parameter in student.parameters())

    def test_says_how_to_draw(self):
        objective = ProgressiveDistillation(steps=4, flow_shift=2.0)
        expected = {"sampler": "euler", "steps": 4, "guidance_scale": 1.0, "flow_shift": 2.0}
        assert {name: objective.sampling()[name] for name in expected} == expected


class TestContract:
    def test_phases_take_turns(self):
        @dataclass(frozen=True, kw_only=True)
        class Adversarial(FlowMatching):
            type: ClassVar[str] = "adversarial"
            trained: ClassVar[tuple[str, ...]] = ("student", "discriminator")

            @property
            def phases(self):
                return Phase("student", ("student",)), Phase("discriminator", ("discriminator",), steps=2)

        names = [Adversarial().phase_at(step).name for step in range(6)]
        assert names == ["student", "discriminator", "discriminator"] * 2

    def test_build_and_options_round_trip(self):
        for options in (
            {"type": "flow_matching", "caption_dropout": 0.2, "sigma": {"kind": "uniform", "shift": 1.0}},
            {"type": "progressive", "steps": 2, "states": "data"},
        ):
            objective = build_objective(options)
            assert isinstance(objective, Objective)
            assert build_objective(objective.options()) == objective
        assert build_objective({"type": "flow_matching", "sigma": {"shift": 1}}).sigma.shift == 1.0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"type": "flow_match"}, "did you mean 'flow_matching'"),
            ({}, "objective.type is '', which is not known"),
            ({"type": "flow_matching", "caption_dropuot": 0.1}, "did you mean 'caption_dropout'"),
            ({"type": "flow_matching", "caption_dropout": 1.5}, "it is a probability"),
            ({"type": "flow_matching", "sigma": {"shfit": 1}}, "objective.sigma.shfit"),
            ({"type": "progressive", "states": "dreams"}, "write trajectory or data"),
            ({"type": "progressive", "steps": "four"}, "objective.steps"),
        ],
    )
    def test_mistakes_are_answered_with_repairs(self, options, message):
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            build_objective(options)
