"""The engine's promises: one meaning for any number of samples, order, first id and chunk; full slots; bounded memory."""

import pytest
import torch
from torch import nn

import fastrefine as fr
from fastrefine.engine import run
from tests.support.refiners import K, convolutional_pair, greedy_slot_steps, pair, refiner, same


@pytest.mark.parametrize("networks", [pair, convolutional_pair])
@pytest.mark.parametrize("slots", [1, 8, 33])
def test_equal_num_slots_give_equal_bits_for_any_n_first_id_and_chunk(networks, slots):
    prior = fr.Normal(4) if networks is pair else fr.Normal(8)
    sampler = fr.DGflow(0.1, gamma=0.1)
    one = refiner(networks(), num_slots=slots, prior=prior, at="1" if networks is pair else "2", sampler=sampler)
    count = 10 if slots == 1 else 50
    whole = one.sample(count, seed=3)
    for first, n in ((0, 1), (0, 33), (13, 20), (37, 13), (32, 17)) if count == 50 else ((0, 1), (3, 5), (6, 4)):
        same(one.sample(n, first_id=first, seed=3), whole.select(slice(first, first + n)))
    for chunk in (1, 7, 1000):
        same(fr.Result.concatenate(list(one.stream(count, seed=3, chunk=chunk))), whole)


def test_refining_given_latents_equals_sampling_them():
    one = refiner()
    out = one.sample(30, seed=4)
    same(one.refine(out.latents, seed=4), out)
    same(one.refine(out.latents[11:], first_id=11, seed=4), out.select(slice(11, None)))


def test_a_second_run_and_a_second_refiner_repeat_the_bits():
    first, second = refiner(), refiner()
    out = first.sample(40)
    same(first.sample(40), out)
    same(second.sample(40), out)
    assert not torch.equal(first.sample(40, seed=1).images, out.images)


def test_number_of_slots_changes_rounding_only():
    networks = pair(dtype=torch.float64)
    outs = [refiner(networks, num_slots=s, precision="float64").sample(50).images for s in (1, 7, 64)]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("stop", [fr.stopping.UniformStep(), fr.stopping.Hazard(0.3), None], ids=repr)
def test_slots_stay_as_full_as_greedy_scheduling_allows(stop):
    out = refiner(stop=stop, max_steps=20, num_slots=16).sample(800)
    evaluations = (out.steps + 1).tolist()
    assert out.report["evaluations"] == sum(evaluations)
    bound = sum(evaluations) / greedy_slot_steps(evaluations, 16)
    assert out.report["slot_efficiency"] >= 0.98 * bound


def test_one_slow_sample_does_not_leave_the_other_slots_idle():
    class OneSlow(fr.stopping.StopRule):
        def draw(self, ids, seed, max_steps, labels=None):
            last = torch.where(ids == 5, max_steps, 1).int()
            return torch.full((len(ids),), torch.inf, dtype=torch.float64), last

    out = refiner(stop=OneSlow(), max_steps=60, num_slots=8).sample(400)
    assert out.steps[5] == 60
    evaluations = (out.steps + 1).tolist()
    assert out.report["slot_steps"] <= 1.02 * greedy_slot_steps(evaluations, 8)


def test_ids_run_at_most_a_window_ahead_so_memory_is_bounded(monkeypatch):
    seen = []
    original = run.Run.launch

    def launch(self):
        original(self)
        seen.append((len(self.waiting), self.machine.window // self.size))

    monkeypatch.setattr(run.Run, "launch", launch)
    monkeypatch.setattr("fastrefine.engine.pacing.MEMORY", 1)
    one = refiner(max_steps=50, num_slots=4)
    out = one.sample(200)
    assert max(w for w, _ in seen) <= 4 == seen[0][1]
    monkeypatch.undo()
    same(out, one.sample(200))


def test_proposals_that_pass_already_retire_unchanged_after_no_step():
    g, d = pair()
    one = refiner((g, d), stop=-1e9)
    out = one.sample(20)
    assert (out.steps == 0).all() and (out.status == fr.Status.REACHED).all()
    torch.testing.assert_close(out.images, g(out.latents).detach())
    assert torch.equal(out.logits, out.initial_logits)


def test_threshold_is_tested_on_the_last_evaluation_too():
    one = refiner(stop=None, max_steps=3)
    out = one.sample(30)
    reached = refiner(stop=float(out.logits.median()), max_steps=3).sample(30)
    at_last = (reached.steps == 3) & (reached.logits >= float(out.logits.median()))
    assert at_last.any() and (reached.status[at_last] == fr.Status.REACHED).all()


def test_keep_best_returns_the_highest_logit_of_the_trajectory():
    sampler = fr.DGflow(0.1, gamma=1.0)  # so noisy that the logit goes up and down
    one = refiner(sampler=sampler, stop=None)
    ends = [one.replaced(max_steps=k).sample(40) for k in range(K + 1)]
    best = one.replaced(keep="best").sample(40)
    trajectory = torch.stack([out.logits for out in ends])
    assert (trajectory[-1] < trajectory.max(0).values).any()
    assert torch.equal(best.logits, trajectory.max(0).values)
    chosen = trajectory.argmax(0)
    images = torch.stack([ends[k].images[i] for i, k in enumerate(chosen.tolist())])
    assert torch.equal(best.images, images)
    assert (best.steps == K).all()


def test_logit_falls_counts_evaluations_below_the_standing_logit():
    sampler = fr.DGflow(0.1, gamma=1.0)
    one = refiner(sampler=sampler, stop=None)
    ends = torch.stack([one.replaced(max_steps=k).sample(40).logits for k in range(K + 1)])
    falls = (ends[1:] < ends[:-1]).sum(0)
    out = one.sample(40)
    assert torch.equal(out.logit_falls.long(), falls) and falls.any()


def test_last_evaluation_is_forward_only_where_all_slots_end_together(monkeypatch):
    from fastrefine.networks.target import Target

    calls = {"evaluate": 0, "forward": 0}
    for name in calls:
        original = getattr(Target, name)

        def counted(self, *args, name=name, original=original):
            calls[name] += 1
            return original(self, *args)

        monkeypatch.setattr(Target, name, counted)
    refiner(stop=None, num_slots=8).sample(16)
    assert calls == {"evaluate": 2 * K, "forward": 2}


def test_max_grad_norm_bounds_the_first_update():
    free = refiner(sampler=fr.Collaborative(1.0, control="fixed"), stop=None, max_steps=1).sample(50)
    bounded = refiner(sampler=fr.Collaborative(1.0, control="fixed"), stop=None, max_steps=1, max_grad_norm=0.01).sample(50)
    start = refiner(stop=None, max_steps=0).sample(50).activations
    assert (free.activations - start).norm(dim=1).max() > 0.03
    assert (bounded.activations - start).norm(dim=1).max() <= 0.01 * 1.001


@pytest.mark.parametrize("bounds", [(0.0, 0.25), (-0.1, 0.0), (0.0, 0.0)])
def test_clamp_holds_after_every_update_also_with_a_bound_of_zero(bounds):
    out = refiner(at="output", sampler=fr.Collaborative(5.0, clamp=bounds, control="fixed"), stop=None).sample(20)
    assert out.images.min() >= bounds[0] and out.images.max() <= bounds[1]


def test_labels_travel_with_the_sample():
    class Conditional(nn.Module):
        def __init__(self, into, out, classes=3):
            super().__init__()
            self.embed, self.body = nn.Embedding(classes, 8), nn.Sequential(nn.Linear(into + 8, 16), nn.Tanh())
            self.head = nn.Linear(16, out)

        def forward(self, x, y):
            return self.head(self.body(torch.cat([x, self.embed(y)], 1)))

    torch.manual_seed(1)
    g, d = Conditional(4, 6).double(), Conditional(6, 1).double()
    labels = torch.arange(50) % 3
    for at in ("input", "body", "output"):
        one = refiner((g, d), at=at, precision="float64", num_slots=7)
        out = one.sample(50, labels=labels, seed=2)
        assert torch.equal(out.labels, labels)
        for c in range(3):
            alone = refiner((g, d), at=at, precision="float64", num_slots=1)
            i = 9 + c
            single = alone.sample(1, first_id=i, labels=labels[i : i + 1], seed=2)
            torch.testing.assert_close(single.images[0], out.images[i], rtol=0, atol=1e-10)
        torch.testing.assert_close(d(out.images, labels).detach()[:, 0], out.logits, rtol=0, atol=1e-9)


def test_real_logits_are_read_per_class_where_labelled():
    real = fr.stopping.RealLogits(torch.tensor([0.0, 1.0, 2.0, 10.0, 11.0, 12.0]), torch.tensor([0, 0, 0, 1, 1, 1]))
    labels = torch.tensor([0, 1, 1, 0])
    threshold, _ = fr.stopping.MedianOfReal().bind(real).draw(torch.arange(4), 0, 5, labels)
    assert threshold.tolist() == [1, 11, 11, 1]
    drawn, _ = fr.stopping.ReferenceSample().bind(real).draw(torch.arange(4), 0, 5, labels)
    assert ((drawn >= 10) == (labels == 1)).all()
    with pytest.raises(fr.InputError, match="no real image has label 2"):
        fr.stopping.MedianOfReal().bind(real).draw(torch.arange(1), 0, 5, torch.tensor([2]))


def test_hazard_and_uniform_step_have_their_laws():
    n, ids = 200_000, torch.arange(200_000)
    _, last = fr.stopping.Hazard(0.3).draw(ids, 7, 1000)
    for k in range(4):  # binomial, 4.4 standard deviations: false alarm 1e-5 each
        p = 0.3 * 0.7**k
        assert abs(float((last == k).double().mean()) - p) < 4.4 * (p * (1 - p) / n) ** 0.5
    _, last = fr.stopping.UniformStep().draw(ids, 7, 4)
    for k in range(5):
        assert abs(float((last == k).double().mean()) - 0.2) < 4.4 * (0.16 / n) ** 0.5
    assert last.min() == 0 and last.max() == 4


def test_score_equals_the_discriminator_and_with_discriminator_changes_it():
    g, d = pair()
    one = refiner((g, d))
    x = torch.randn(21, 6)
    torch.testing.assert_close(one.score(x), d(x).detach()[:, 0])
    _, other = pair(width=20)
    two = one.with_discriminator(other)
    torch.testing.assert_close(two.score(x), other(x).detach()[:, 0])
    torch.testing.assert_close(two.sample(5).logits, other(two.sample(5).images).detach()[:, 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(one.score(x), d(x).detach()[:, 0])


def test_report_counts_add_up_and_grow_over_a_stream():
    reports = [part.report for part in refiner().stream(64, chunk=16)]
    assert [r["evaluations"] for r in reports] == sorted(r["evaluations"] for r in reports)
    last = reports[-1]
    assert last["slot_steps"] % 8 == 0 and last["slot_efficiency"] == last["evaluations"] / last["slot_steps"]
    assert last["num_slots"] == 8 and last["driver"] == "host" and last["precision"] == "float32"
    assert last["threads"] >= 1 and last["seconds"] > 0 and last["images_per_second"] > 0


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "tf32"])
def test_low_precision_stays_close_and_keeps_its_state_in_float32(precision):
    networks = convolutional_pair()
    options = dict(at="2", prior=fr.Normal(8), stop=None, max_steps=3, sampler=fr.Collaborative(0.1, control="fixed"))
    one = refiner(networks, **options)
    full, start = one.sample(16), one.replaced(max_steps=0).sample(16)
    low = refiner(networks, precision=precision, **options).sample(16)
    assert low.images.dtype == low.activations.dtype == torch.float32
    moved = (full.activations - start.activations).abs().max()
    assert (full.activations - low.activations).abs().max() < 0.2 * moved + 1e-6


def test_a_sampler_of_ones_own_sees_labels_and_runs_on_the_reference():
    class Scaled(fr.samplers.Sampler):
        """Steps as long as the class number says."""

        def init(self, a, sample):
            return {**super().init(a, sample), "rate": sample.label.to(a.dtype)}

        def propose(self, state, step, noise):
            return state["position"] - state["rate"][:, None] * state["grad"], state

    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(3, 4), nn.Linear(4, 6)

        def forward(self, z, y):
            return self.head(z + self.embed(y))

    torch.manual_seed(0)
    labels = torch.arange(30) % 3
    out = refiner((Conditional(), pair()[1]), sampler=Scaled(), at="input", stop=None).sample(30, labels=labels)
    moved = (out.latents - fr.Normal(4).sample(torch.arange(30), 0)).abs().amax(1) > 0
    assert torch.equal(moved, labels > 0) and out.report["backend"] == "reference"


def test_where_the_step_cannot_be_recorded_samples_agree_to_rounding_and_equal_bits_are_refused():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 1))

        def forward(self, x):
            return self.body(x) if x.mean() < 1e6 else self.body(2 * x)

    torch.manual_seed(0)
    one = refiner((pair()[0], Branching()), num_slots=7)
    whole = one.sample(70)
    assert whole.report["route"] == "autograd" and whole.report["repeatable"] == "to rounding"
    for i in range(0, 70, 9):
        torch.testing.assert_close(one.sample(1, first_id=i).images, whole.images[i : i + 1], rtol=0, atol=1e-5)
    with pytest.raises(fr.InputError, match="deterministic=True wants equal bits.*step recorded: "):
        one.replaced(deterministic=True).sample(4)


def test_updated_weights_are_noticed():
    g, d = pair()
    one = refiner((g, d))
    x, before = torch.randn(5, 6), refiner((g, d)).sample(5)
    old = one.score(x)
    assert torch.equal(one.sample(5).images, before.images)
    with torch.no_grad():
        d[2].bias += 100
    torch.testing.assert_close(one.score(x), old + 100)
    assert (one.sample(5).logits > 50).all()
    with torch.no_grad():
        g[4].bias += 1
    torch.testing.assert_close(refiner((g, d)).sample(5).images, one.sample(5).images)


def test_one_thread_serves_small_work_and_all_serve_large_work():
    small, large = refiner(), refiner(pair(width=512), num_slots=256, at="input", max_steps=1)
    torch.set_num_threads(2)
    try:
        assert small.sample(2).report["threads"] == 1
        assert large.sample(2).report["threads"] == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_nested_products_of_priors_are_independent():
    nested = fr.Product(fr.Product(fr.Normal(2), fr.Normal(2)), fr.Normal(2)).sample(torch.arange(5), 0)
    columns = nested.T.tolist()
    assert len({tuple(c) for c in columns}) == 6


def test_nonfinite_logits_of_real_images_are_an_error():
    g, d = pair()
    real = torch.randn(9, 6)
    real[4] = 3e38
    with pytest.raises(fr.InputError, match=r"non-finite logits, first at \[4\]"):
        refiner((g, d), real=real, stop=fr.stopping.MedianOfReal()).sample(3)


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
def test_label_vectors_are_cast_to_the_networks_dtype(precision):
    class Conditional(nn.Module):
        def __init__(self, out):
            super().__init__()
            self.label, self.head = nn.Linear(3, 4), nn.LazyLinear(out)

        def forward(self, x, y):
            return self.head(torch.cat([x, self.label(y)], 1))

    g, d = Conditional(6), Conditional(1)
    labels = torch.eye(3)[torch.arange(8) % 3]
    d(g(torch.randn(8, 4), labels), labels)
    for given in (labels, labels.double()):
        assert refiner((g, d), at="input", precision=precision, stop=None).sample(8, labels=given).images.isfinite().all()
