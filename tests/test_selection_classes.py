"""Selection class by class: the law of each, invariance to the others, budgets, edges, conditional networks end to end."""

import math

import pytest
import torch
from scipy import stats
from torch import nn

import fastrefine as fr
from tests.support.selection_laws import ALPHA, acceptance, along_the_shift, conditional, drs, real_images

# Class c: data N(MEANS[c], SCALES[c]^2), generator N(0, 1); its logits are off by OFFSETS[c], which no class by itself minds.
MEANS, SCALES, OFFSETS = torch.tensor([0.5, -0.4, 0.0]), torch.tensor([0.7, 0.6, 0.8]), torch.tensor([0.0, 2.0, -3.0])
SHARES = torch.tensor([0.5, 0.2, 0.3])


def draw(n, seed=0):
    """(x, logits, labels) of n proposals of mixed classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator, dtype=torch.float64)
    y = torch.multinomial(SHARES, n, replacement=True, generator=generator)
    return x, logit_of(x, y), y


def logit_of(x, y):
    m, s = MEANS[y].double(), SCALES[y].double()
    return -0.5 * ((x - m) / s) ** 2 - s.log() + 0.5 * x**2 + OFFSETS[y]


def p_values(x, y):
    """For: the samples of each class follow its data."""
    return [
        stats.kstest(((x[y == c] - MEANS[c]) / SCALES[c]).double().numpy(), "norm").pvalue if (y == c).sum() > 1 else 0.0
        for c in range(3)
    ]


SELECTORS = {
    "chains": lambda d, **k: fr.metropolis_hastings(d, 7, **k).indices,
    "rejection": lambda d, **k: fr.rejection_sample(d, 80, **k),
    "rejection after a pilot": lambda d, **k: fr.rejection_sample(d, 80, 0.1, **k),
    "budget": lambda d, **k: fr.budgeted_rejection(d, 0.3, **k),
    "best": lambda d, seed=0, **k: fr.best_of_n(d, 5, **k),
}
by_every_selector = pytest.mark.parametrize("select", SELECTORS.values(), ids=SELECTORS)


def test_chain_ends_follow_the_data_of_their_class():
    x, d, y = draw(31 * 15_000)
    chosen = fr.metropolis_hastings(d, 31, labels=y).indices
    assert min(p_values(x[chosen], y[chosen])) > ALPHA
    shares = y[chosen].bincount(minlength=3) / len(chosen)
    assert (shares - SHARES).abs().max() < 0.01, "each class keeps its share"
    mixed = fr.metropolis_hastings(d, 31).indices
    assert (y[mixed] == 1).double().mean() > 0.7, "the test can fail: without labels the class with the offset wins"
    wrong = fr.metropolis_hastings(d, 31, labels=torch.zeros_like(y)).indices
    assert torch.equal(wrong, mixed)


def test_chains_from_real_logits_of_their_class_follow_its_data_at_once():
    length = 3
    _, d, y = draw(length * 30_000)
    _, _, labels = draw(60_000, 5)
    real = MEANS[labels] + SCALES[labels] * draw(60_000, 6)[0]
    result = fr.metropolis_hastings(d, length, logit_of(real, labels), labels=y, initial_labels=labels)
    # those that never moved would be the real images they started from: take only acceptance from stationarity
    assert result.moved.double().mean() > 0.9

    def rate(initial_labels):
        return fr.metropolis_hastings(
            d, length, logit_of(real, labels), labels=y, initial_labels=initial_labels
        ).acceptance_rate

    wanted = 0.0
    for c in range(3):
        u, v = logit_of(draw(100_000, 7)[0], torch.full((100_000,), c)), logit_of(real[labels == c], labels[labels == c])
        v = v[torch.arange(100_000) % len(v)]
        wanted += float(SHARES[c]) * float((u - v).clamp(max=0).exp().mean())
    assert rate(labels) == pytest.approx(wanted, abs=0.01)
    assert abs(rate(labels.roll(1)) - wanted) > 0.05, "the test can fail: starts of another class"


def test_chains_of_a_class_test_its_own_proposals_in_order():
    y = torch.tensor([4, 9, 4, 4, 9, 9, 4, 9, 9, 4, 7])
    d = torch.arange(11.0)  # rising, so that every proposal is accepted
    with pytest.warns(fr.FastrefineWarning, match=r"1 of 3 classes make no chain of 2 and are left out, first \[7\]") as told:
        result = fr.metropolis_hastings(d, 2, labels=y)
    assert result.indices.tolist() == [2, 6, 4, 7]  # class 4: (0, 2), (3, 6), class 9: (1, 4), (5, 7); 9, 8 and 10 are left
    assert result.acceptance_rate == 1 and told[0].filename == __file__


@by_every_selector
def test_a_class_by_itself_is_chosen_as_among_others(select):
    _, d, y = draw(4_000)
    whole = select(d, seed=5, labels=y)
    for c in range(3):
        mine = (y == c).nonzero()[:, 0]
        alone = mine[select(d[mine], seed=5, labels=c)]
        assert torch.equal(whole[y[whole] == c], alone)
    if select is not SELECTORS["best"]:
        assert not torch.equal(select(d, seed=6, labels=y), whole)


@by_every_selector
def test_the_mixture_of_the_classes_changes_nothing_within_one(select):
    _, d, y = draw(4_000)
    order = torch.argsort((y - 1) % 3, stable=True)  # another mixture, in which each class keeps its order
    whole, again = select(d, labels=y), order[select(d[order], labels=y[order])]
    assert torch.equal(whole.sort().values, again.sort().values)


@by_every_selector
def test_one_class_zero_is_no_classes_and_vectors_are_read_by_their_largest_entry(select):
    _, d, y = draw(3_000)
    assert torch.equal(select(d, seed=3), select(d, seed=3, labels=0))
    vectors = nn.functional.one_hot(y, 3)
    for labels in (vectors, vectors + 0.3 * torch.rand(3_000, 3), y.int(), y.numpy()):
        assert torch.equal(select(d, labels=labels), select(d, labels=y))


def test_rows_of_different_classes_draw_different_numbers():
    d = torch.zeros(40_000)
    y = torch.arange(40_000) % 2
    chosen = torch.zeros(40_000).index_fill(0, fr.budgeted_rejection(d, 0.5, labels=y), 1.0).view(-1, 2)
    assert abs(float(torch.corrcoef(chosen.T)[0, 1])) < 4 / math.sqrt(20_000)


@pytest.mark.parametrize("log_m", [None, -0.5, {0: 0.1, 1: 2.5, 2: -2.9}])
def test_rejection_has_m_and_gamma_of_each_class(log_m):
    _, d, y = draw(30_000)
    indices = fr.rejection_sample(d, 80, log_m, seed=1, labels=y)
    wanted = torch.zeros_like(d)
    for c in range(3):
        wanted[y == c] = drs(d[y == c], 80, log_m[c] if isinstance(log_m, dict) else log_m)
    assert acceptance(wanted, indices) > ALPHA
    assert acceptance(drs(d, 80, log_m if isinstance(log_m, float) else None), indices) < ALPHA, "the test can fail"
    assert torch.equal(indices, indices.sort().values)


def test_the_budget_holds_in_each_class_and_its_samples_follow_its_data():
    x, d, y = draw(120_000)
    budget = 0.4  # below one over the largest ratio of each class, so that nothing is cut off
    indices = fr.budgeted_rejection(d, budget, seed=3, labels=y)
    assert min(p_values(x[indices], y[indices])) > ALPHA
    for c in range(3):
        number = int((y == c).sum())
        accepted = int((y[indices] == c).sum())
        assert abs(accepted - budget * number) < 4 * math.sqrt(number * budget * (1 - budget))
    pooled = fr.budgeted_rejection(d, budget, seed=3)
    assert (y[pooled] == 1).double().mean() > 0.4, "without labels the class that D prefers gains share"
    assert min(p_values(x[pooled], y[pooled])) < ALPHA, "the test can fail"


def test_best_of_n_takes_groups_of_one_class():
    _, d, y = draw(500)
    indices = fr.best_of_n(d, 6, labels=y)
    for c in range(3):
        mine = (y == c).nonzero()[:, 0]
        table = mine[: len(mine) // 6 * 6].view(-1, 6)
        assert indices[y[indices] == c].tolist() == table[torch.arange(len(table)), d[table].argmax(1)].tolist()
    assert torch.equal(y[indices], y[indices].sort().values)


def test_a_thousand_classes_of_a_million_proposals_take_no_loop_over_proposals():
    generator = torch.Generator().manual_seed(0)
    d, y = torch.randn(1_000_000, generator=generator), torch.randint(1000, (1_000_000,), generator=generator)
    count = y.bincount(minlength=1000)
    assert len(fr.metropolis_hastings(d, 20, labels=y).indices) == int((count // 20).sum())
    chosen = fr.budgeted_rejection(d, 0.25, labels=y)
    spread = (count * 0.25 * 0.75).sqrt()
    assert ((y[chosen].bincount(minlength=1000) - 0.25 * count).abs() < 6 * spread).all()
    assert (y[fr.rejection_sample(d, labels=y)].bincount(minlength=1000) > 0).all()


def test_classes_of_which_nothing_is_accepted_are_named():
    d, y = torch.tensor([0.0, 1.0, math.nan, -math.inf]), torch.tensor([0, 0, 5, 5])
    with pytest.warns(fr.FastrefineWarning, match=r"accepted no proposal of 1 of 2 classes, first \[5\]"):
        assert fr.budgeted_rejection(d, 1.0, labels=y).tolist() == [0, 1]
    with pytest.warns(fr.FastrefineWarning, match=r"accepted no proposal of 1 of 2 classes, first \[5\]"):
        assert set(fr.rejection_sample(d, 0, labels=y).tolist()) <= {0, 1}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d, y: fr.metropolis_hastings(d, 2, labels=y[:3]), "labels: got 3 labels for 6 samples"),
        (lambda d, y: fr.best_of_n(d, 2, labels=y.double()), "labels: labels must be whole numbers"),
        (lambda d, y: fr.metropolis_hastings(d, 4, labels=y), "6 logits do not make one chain of 4 of one class"),
        (lambda d, y: fr.best_of_n(d, 4, labels=y), "6 logits do not make one group of 4 of one class"),
        (lambda d, y: fr.metropolis_hastings(d, 2, d, labels=y), "need both labels and initial_labels"),
        (lambda d, y: fr.metropolis_hastings(d, 2, d, initial_labels=y), "need both labels and initial_labels"),
        (lambda d, y: fr.metropolis_hastings(d, 2, labels=y, initial_labels=y), "without initial_logits"),
        (
            lambda d, y: fr.metropolis_hastings(d, 2, d[:2], labels=y, initial_labels=[0, 0]),
            r"of 1 classes, first \[1\]",
        ),
        (lambda d, y: fr.metropolis_hastings(d, 2, d, labels=y, initial_labels=y[:2]), "initial_labels: got 2 labels for 6"),
        (lambda d, y: fr.rejection_sample(d, log_m={0: 1.0}, labels=y), "no number for class 1"),
        (lambda d, y: fr.rejection_sample(d, log_m={0: 1.0}), "log_m by class needs labels"),
    ],
)
def test_what_does_not_fit_together_is_named(call, message):
    with pytest.raises(fr.InputError, match=message):
        call(torch.arange(6.0), torch.tensor([0, 1, 0, 1, 0, 1]))


def test_conditional_networks_and_chains_by_class_give_the_data_of_each_class(recwarn):
    labels, real_labels = torch.arange(60_000) % 3, torch.arange(6_000) % 3
    real = real_images(real_labels)
    assert stats.kstest(along_the_shift(real, real_labels), "norm").pvalue > ALPHA
    out = conditional(real=real, real_labels=real_labels).sample(60_000, labels=labels)
    result = fr.metropolis_hastings(out, 20, out.real_logits, labels=out.labels, initial_labels=out.real_labels)
    chosen = out.select(result.indices)
    assert len(chosen) == 3_000 and (chosen.labels.bincount() == 1_000).all()
    assert not [w for w in recwarn if issubclass(w.category, fr.FastrefineWarning)], "D is optimal, and trusted"
    few = out.select(fr.budgeted_rejection(out, 0.2, labels=out.labels))
    for part in (chosen, few):
        for c in range(3):
            one = part.select(part.labels == c)
            assert stats.kstest(along_the_shift(one.images, one.labels), "norm").pvalue > ALPHA
    raw = out.select(slice(0, 3_000))
    assert stats.kstest(along_the_shift(raw.images, raw.labels), "norm").pvalue < ALPHA, "the test can fail"


@pytest.mark.parametrize("sampler", [fr.Collaborative(0.1), fr.DGflow(0.1)], ids=["collaborative", "dgflow"])
@pytest.mark.parametrize("vectors", [False, True])
def test_refined_conditional_samples_are_selected_with_their_labels(sampler, vectors):
    refiner = conditional(
        sampler=sampler, max_steps=3, real=real_images(torch.arange(90) % 3), real_labels=torch.arange(90) % 3
    )
    labels = torch.tensor([2, 0, 1, 0]).repeat(100)
    out = refiner.sample(400, labels=labels)
    assert (out.steps == 3).all() and out.logits.mean() > out.initial_logits.mean()
    given = nn.functional.one_hot(out.labels, 3) if vectors else out.labels
    result = fr.metropolis_hastings(out, 10, out.real_logits, labels=given, initial_labels=out.real_labels, untrusted="allow")
    chosen = out.select(result.indices)
    assert chosen.labels.tolist() == [0] * 20 + [1] * 10 + [2] * 10
    for part in (chosen, out.select(fr.rejection_sample(out, 50, labels=given, untrusted="allow"))):
        assert set(part.labels.tolist()) == {0, 1, 2}
        assert torch.allclose(part.logits, refiner.score(part.images, part.labels), atol=1e-4)
