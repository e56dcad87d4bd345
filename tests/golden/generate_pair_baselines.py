"""Writes pair_baselines.json beside this file: what PoLora, LoraMuon, LoraTsd and AltLora do, by other means.

Run by hand, with NumPy alone; the file is committed (NumPy 2.4 wrote it). No implementation of these that can be run
as it is comes from a package registry, so this is a second one: one pair at a time, the weight's gradient and its
projections as whole m × n matrices, and every polynomial applied to the singular values of an SVD instead of to
matrices. What it has in common with the library are the papers' formulas and tables of coefficients. Beside it were
run once, in float64 and for 25 steps: the authors' AltLoRA (LucasXinYu/AltLoRA, without bias correction), a public
LoRA-Muon (seruva19/mirai) and transcripts of public ports of PoLoRA and LoRA-TSD. They agreed to 2e-14, LoRA-TSD from
B = 0 to 2e-10.
"""

import json
from pathlib import Path

import numpy as np

STEPS = 25
CHECKPOINTS = (1, 5, 25)
SHAPES = ((7, 5, 3), (7, 5, 3), (4, 6, 2))  # in, out, rank: two of one shape, and another


def singular(x, function):
    u, s, vh = np.linalg.svd(x, full_matrices=False)
    return (u * function(s)) @ vh


def composed(polynomials):
    def apply(s):
        for a, b, c in polynomials:
            s = a * s + b * s**3 + c * s**5
        return s

    return apply


def msign(x, polynomials, floor=0.0):
    """Of singular values relative to the Frobenius norm, or exactly, without polynomials."""
    size = max(np.linalg.norm(x), floor)
    if size == 0 or not x.any():
        return np.zeros_like(x)
    if polynomials is None:
        return singular(x, lambda s: (s > s[0] * max(x.shape) * np.finfo(float).eps).astype(float))
    return singular(x / size, composed(polynomials))


def inverse_root(s, polynomials, scale):
    """s^{-1/2}: the polynomials bring x = √(λ / scale) to about 1, and so their factor p(x)/x is about 1/x."""
    values, vectors = np.linalg.eigh((s + s.T) / 2)
    x = np.sqrt(np.maximum(values, 0) / scale)
    factors = np.sqrt(scale / values) if polynomials is None else composed(polynomials)(x) / x
    return (vectors * factors) @ vectors.T / np.sqrt(scale)


def shrunk(polynomials, gamma):
    return [(a / gamma, b / gamma**3, c / gamma**5) for a, b, c in polynomials]


def top_vector(s, start, count):
    values, vectors = np.linalg.eigh((s + s.T) / 2)
    coordinates = (np.abs(values) / max(np.abs(values).max(), 1e-300)) ** count * (vectors.T @ start)
    result = vectors @ coordinates
    return result / max(np.linalg.norm(result), 1e-300)


# --- PoLoRA ---------------------------------------------------------------------------------------------------------

POLAR_EXPRESS = [
    (8.31968561540051, -23.85945031896673, 17.53144504181025),
    (4.123266419055485, -2.980709974760902, 0.5520797360741728),
    (3.9656114721772022, -2.941248486368672, 0.5589295013119786),
    (3.3312009004415994, -2.4980080275937966, 0.5111272954169234),
    (2.320007312889811, -1.6862169729967622, 0.42068027340235137),
    (1.8951443404954809, -1.2722050191923813, 0.377227344813122),
    (1.875006772051659, -1.250007524486259, 0.37500075245392533),
    (1.8750008025096776, -1.2500016050034328, 0.375000802493755),
    (1.8749954784656357, -1.249990956953079, 0.374995478487443),
    (1.8749954775662068, -1.2499909551542292, 0.3749954775880226),
]


class PoLora:
    def __init__(self, lr, betas=(0.9, 0.99), damping=1e-4, eps=1e-12, steps=8, power_steps=8, exact=False):
        self.lr, self.betas, self.damping, self.eps, self.power_steps = lr, betas, damping, eps, power_steps
        table = POLAR_EXPRESS[:steps] + [POLAR_EXPRESS[-1]] * (steps - len(POLAR_EXPRESS))
        self.polynomials = None if exact else shrunk(table[:-1], 1.01) + table[-1:]
        self.state = None

    def norm(self, x, name):
        if self.polynomials is None:
            return np.linalg.norm(x, 2)
        start = self.tops.get(name)
        if start is None or not start.any():
            start = x.sum(1) if name.endswith("a") else x.sum(0)
        gram = x @ x.T if name.endswith("a") else x.T @ x
        v = self.tops[name] = top_vector(gram, start, self.power_steps)
        rows = max(np.linalg.norm(x, axis=0).max(), np.linalg.norm(x, axis=1).max())
        return max(np.sqrt(v @ gram @ v), rows)

    def root(self, c):
        if self.polynomials is None:
            top = np.linalg.norm(c, 2)
        else:
            v = top_vector(c, c.sum(1), self.power_steps)
            top = max(v @ c @ v, np.linalg.norm(c, axis=1).max())
        damped = c + max(self.damping * top, self.eps) * np.eye(len(c))
        return inverse_root(damped, self.polynomials, np.trace(damped))

    def step(self, a, b, g_a, g_b):
        if self.state is None:
            self.state = [
                np.zeros_like(a),
                np.zeros_like(b),
                np.full(a.shape[1], self.eps),
                np.full(b.shape[0], self.eps),
            ]
            self.tops = {}
        m_a, m_b, q, p = self.state
        beta1, beta2 = self.betas
        m_a, m_b = beta1 * m_a + (1 - beta1) * g_a, beta1 * m_b + (1 - beta1) * g_b
        in_weights, out_weights = np.diag(q / q.max() + self.damping), np.diag(p / p.max() + self.damping)
        root_b, root_a = self.root(b.T @ out_weights @ b), self.root(a @ in_weights @ a.T)
        in_root, out_root = np.diag(np.diag(in_weights) ** -0.5), np.diag(np.diag(out_weights) ** -0.5)
        rho = self.lr / max(self.norm(a, "factor a") + self.norm(b, "factor b"), self.eps)
        d_a = root_b @ msign(root_b @ (beta1 * m_a + (1 - beta1) * g_a) @ in_root, self.polynomials) @ in_root
        d_b = out_root @ msign(out_root @ (beta1 * m_b + (1 - beta1) * g_b) @ root_a, self.polynomials) @ root_a
        rank = len(a)
        q = beta2 * q + (1 - beta2) * np.diag(g_a.T @ root_b @ root_b @ g_a) / rank
        p = beta2 * p + (1 - beta2) * np.diag(g_b @ root_a @ root_a @ g_b.T) / rank
        self.state = [m_a, m_b, q, p]
        return (
            a - rho * d_a / max(self.norm(d_a, "step a"), self.eps),
            b - rho * d_b / max(self.norm(d_b, "step b"), self.eps),
        )


# --- LoRA-Muon ------------------------------------------------------------------------------------------------------

MSIGN = [
    (7.2086, -15.5131, 9.0178),
    (3.9623, -2.5813, 0.4542),
    (3.9466, -2.5765, 0.4544),
    (3.8991, -2.5671, 0.4566),
    (3.7186, -2.5308, 0.4653),
    (3.1390, -2.3073, 0.4733),
    (2.1715, -1.5246, 0.3885),
    (1.8648, -1.2224, 0.3577),
]
ROOT = [
    (7.424865680309214, -18.39581635618996, 12.896720413604342),
    (3.4877256051546017, -2.3300436563986993, 0.4404692168431095),
    (2.7766085124882527, -2.070643152532662, 0.46302261050004967),
    (1.9913142104341506, -1.373936700681269, 0.3875934979568538),
    (1.8754637749479246, -1.2505152090010534, 0.37505152463617264),
    (1.874999066623701, -1.2499981332141676, 0.37499906659046633),
    (1.875, -1.25, 0.375),
]


class LoraMuon:
    def __init__(self, lr, momentum=0.9, weight_decay=0.0, damping=1e-5, steps=8, root_steps=7, exact=False):
        self.lr, self.momentum, self.decay, self.damping = lr, momentum, weight_decay, damping
        self.msign = None if exact else MSIGN[:steps]
        self.roots = None if exact else shrunk(ROOT[:root_steps], 1.001)
        self.state = None

    def root(self, gram):
        size = np.linalg.norm(gram)
        if size == 0:
            return np.zeros_like(gram)
        return inverse_root(gram / size + self.damping * np.eye(len(gram)), self.roots, 1.0) / np.sqrt(size)

    def step(self, a, b, g_a, g_b):
        m_a, m_b = self.state or (np.zeros_like(a), np.zeros_like(b))
        m_a, m_b = (self.momentum * m + (1 - self.momentum) * g for m, g in ((m_a, g_a), (m_b, g_b)))
        self.state = m_a, m_b
        of_b, of_a = self.root(b.T @ b), self.root(a @ a.T)
        s = np.sqrt(1 - self.lr * self.decay)
        half = self.lr / 2 / s
        return (
            s * a - half * of_b @ msign(of_b @ m_a, self.msign),
            s * b - half * msign(m_b @ of_a, self.msign) @ of_a,
        )


# --- LoRA-TSD -------------------------------------------------------------------------------------------------------


class LoraTsd:
    def __init__(self, lr, momentum=0.95, iterations=5, steps=5, ridge=1e-8, balance_interval=250, exact=False):
        self.lr, self.momentum, self.iterations, self.ridge = lr, momentum, iterations, ridge
        self.polynomials = None if exact else [(3.4445, -4.7750, 2.0315)] * steps
        self.balance_interval, self.state, self.count = balance_interval, None, 0

    def inverse(self, gram):
        ridge = self.ridge * max(np.trace(gram) / len(gram), 1e-12)
        return np.linalg.inv(gram + ridge * np.eye(len(gram)))

    def step(self, a, b, g_a, g_b):
        m_a, m_b = self.state or (np.zeros_like(a), np.zeros_like(b))
        m_a, m_b = (self.momentum * m + (1 - self.momentum) * g for m, g in ((m_a, g_a), (m_b, g_b)))
        of_a, of_b = self.inverse(a @ a.T), self.inverse(b.T @ b)
        p_a, p_b = np.linalg.pinv(a) @ a, b @ np.linalg.pinv(b)
        x = b @ of_b @ m_a + m_b @ of_a @ a - b @ (of_b @ m_a @ a.T @ of_a) @ a
        for _ in range(self.iterations):
            z = msign(x, self.polynomials, 1e-7)
            x = p_b @ z + z @ p_a - p_b @ z @ p_a
        d_w = -self.lr * x
        d_b = d_w @ a.T @ of_a
        a, b = a + of_b @ b.T @ (d_w - d_b @ a), b + d_b
        self.count += 1
        if self.balance_interval and self.count % self.balance_interval == 0:
            c = np.sqrt(np.linalg.norm(b) / np.linalg.norm(a))
            a, b, m_a, m_b = a * c, b / c, m_a / c, m_b * c
        self.state = m_a, m_b
        return a, b


# --- AltLoRA --------------------------------------------------------------------------------------------------------


class AltLora:
    def __init__(self, lr, momentum=0.9, weight_decay=0.0, damping=1e-6, alternating=True):
        self.lr, self.momentum, self.decay, self.damping, self.alternating = (
            lr,
            momentum,
            weight_decay,
            damping,
            alternating,
        )
        self.m_a = self.m_b = None
        self.count = 0

    def step(self, a, b, g_a, g_b):
        identity = self.damping * np.eye(len(a))
        turn_of_a = self.count % 2 == 0
        self.count += 1
        if turn_of_a or not self.alternating:
            inverse = np.linalg.inv(b.T @ b + identity)
            carried = 0 if self.m_a is None else inverse @ b.T @ self.last_b @ self.m_a
            self.m_a, self.last_b = self.momentum * carried + (1 - self.momentum) * inverse @ g_a, b
            a = (1 - self.lr * self.decay) * a - self.lr * self.m_a
        if not turn_of_a or not self.alternating:
            inverse = np.linalg.inv(a @ a.T + identity)
            carried = 0 if self.m_b is None else self.m_b @ self.last_a @ a.T @ inverse
            self.m_b, self.last_a = self.momentum * carried + (1 - self.momentum) * g_b @ inverse, a
            b = (1 - self.lr * self.decay) * b - self.lr * self.m_b
        return a, b


# Muon's polynomial, of LoRA-TSD, has the slope −1.6 at its fixed point: τ = 5 times 5 of them magnify a difference 1e5
# times a step, and LoRA-Muon's first ones alone do something like it. Where factors change by much in a step, as from
# B = 0 at any rate, two runs part that differ by round-off. The others start the last pair there.
EXPANDING = ("lora_muon_options", "lora_tsd", "lora_tsd_options")

CASES = {
    "polora": lambda: PoLora(0.05),
    "polora_options": lambda: PoLora(0.02, betas=(0.8, 0.9), damping=1e-3, eps=1e-10, steps=11, power_steps=3),
    "polora_exact": lambda: PoLora(0.05, exact=True),
    "lora_muon": lambda: LoraMuon(0.1),
    "lora_muon_options": lambda: LoraMuon(0.02, momentum=0.5, weight_decay=0.3, damping=1e-3, steps=7, root_steps=6),
    "lora_muon_exact": lambda: LoraMuon(0.1, exact=True),
    "lora_tsd": lambda: LoraTsd(0.005),
    "lora_tsd_options": lambda: LoraTsd(0.02, momentum=0.5, iterations=2, steps=7, ridge=1e-3, balance_interval=2),
    "lora_tsd_exact": lambda: LoraTsd(0.05, iterations=3, exact=True),
    "altlora": lambda: AltLora(0.05),
    "altlora_options": lambda: AltLora(0.02, momentum=0.5, weight_decay=0.1, damping=1e-2, alternating=False),
}


def main():
    random = np.random.default_rng(2026)
    # Three decimals, exact as doubles and short as text.
    normal = lambda *shape: np.round(random.standard_normal(shape), 3)
    start = [(normal(rank, inner), normal(outer, rank) / 2) for inner, outer, rank in SHAPES]
    gradients = [[normal(outer, inner) for inner, outer, rank in SHAPES] for _ in range(STEPS)]
    result = {
        "shapes": [{"a": [rank, inner], "b": [outer, rank]} for inner, outer, rank in SHAPES],
        "start": [{"a": a.ravel().tolist(), "b": b.ravel().tolist()} for a, b in start],
        "gradients": [[g.ravel().tolist() for g in step] for step in gradients],
        "cases": {},
    }
    for name, make in CASES.items():
        pairs, optimizers = [(a, b.copy()) for a, b in start], [make() for _ in SHAPES]
        checkpoints = {"from_zero": name not in EXPANDING}
        if checkpoints["from_zero"]:
            pairs[-1][1][:] = 0
        for step in range(1, STEPS + 1):
            pairs = [
                optimizer.step(a, b, b.T @ g, g @ a.T)
                for optimizer, (a, b), g in zip(optimizers, pairs, gradients[step - 1])
            ]
            if step in CHECKPOINTS:
                checkpoints[str(step)] = [{"a": a.ravel().tolist(), "b": b.ravel().tolist()} for a, b in pairs]
        result["cases"][name] = checkpoints
    with open(Path(__file__).with_name("pair_baselines.json"), "w", encoding="utf-8") as file:
        json.dump(result, file)
        file.write("\n")


if __name__ == "__main__":
    main()
