"""Nested small FFNs in closed form: which of big's neurons are worth most, and a down projection for the first ones.

Neurons go one after the other, those first whose loss costs least when all that stay make up for it as well as they
can: Optimal Brain Surgeon's price, ``|A_j|^2 / [C^-1]_jj`` with C the second moments of what neurons say and A the best
down projection of those that are left (Hassibi and Stork 1993). A share of them goes in each round.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from duo_mlx.convert.graft.solve import Matrix, Moments

RIDGE = 1e-2  # of the mean square of what neurons say
ROUND = 0.15  # share of the neurons that go in a round
LAST = 1 / 32  # share of big's neurons that are left for the last round


@dataclass(frozen=True)
class Ranking:
    """Big's neurons in the order of their worth."""

    order: NDArray[np.intp]  # [neurons], the most useful first
    errors: NDArray[np.float64]  # [neurons + 1], the error of the first k with the best down projection


def rank(gram: Matrix, down: Matrix, metric: Matrix) -> Ranking:
    """Rank big's neurons.

    Args:
        gram: ``[1 + neurons, 1 + neurons]``, second moments of a constant and of what neurons say.
        down: ``[outputs, neurons]``, big's down projection.
        metric: ``[outputs, outputs]``, symmetric; an error e counts as the square of ``metric @ e``.
    """
    whole = gram.astype(np.float64)
    whole[np.diag_indices_from(whole)] += ridge(gram)
    targets = gram[:, 1:].astype(np.float64) @ (metric @ down).T
    inverse = np.linalg.inv(whole)
    solved = inverse @ targets  # the best down projection of those that are left, with the bias in row 0
    kept, gone = np.arange(1, len(gram)), list[NDArray[np.intp]]()
    while True:
        price = np.square(solved[1:]).sum(axis=1) / np.diag(inverse)[1:]
        ranked = np.argsort(-price)
        if len(kept) <= LAST * (len(gram) - 1) + 1:
            break
        stay = min(len(kept) - 1, round((1 - ROUND) * len(kept)))
        gone.append(kept[ranked[stay:]])
        stays, goes = np.r_[0, 1 + np.sort(ranked[:stay])], 1 + ranked[stay:]
        # what a matrix's inverse becomes without some of its rows and columns
        passed = np.linalg.solve(inverse[np.ix_(goes, goes)], np.c_[inverse[np.ix_(goes, stays)], solved[goes]])
        among = inverse[np.ix_(stays, goes)]
        solved = solved[stays] - among @ passed[:, len(stays) :]
        inverse = inverse[np.ix_(stays, stays)] - among @ passed[:, : len(stays)]
        kept = kept[stays[1:] - 1]
    order = np.concatenate([kept[ranked], *reversed(gone)])
    return Ranking(order - 1, _errors(whole, gram, targets, down, metric, order))


def _errors(
    whole: NDArray[np.float64], gram: Matrix, targets: Matrix, down: Matrix, metric: Matrix, order: NDArray[np.intp]
) -> NDArray[np.float64]:
    """The errors that are left by the constant and the first 0, 1, ... neurons of an order.

    With L the Cholesky factor of the moments in that order, the rows of ``L^-1 targets`` say what each adds.
    """
    take = np.r_[0, order]
    said = np.linalg.solve(np.linalg.cholesky(whole[np.ix_(take, take)]), targets[take])
    heard = metric @ down
    total = float(np.einsum("on,nm,om->", heard, gram[1:, 1:].astype(np.float64), heard, optimize=True))
    return np.maximum(total - np.cumsum(np.square(said).sum(axis=1)), 0)


def solve_down(moments: Moments, order: NDArray[np.intp], width: int) -> tuple[Matrix, Matrix]:
    """The down projection ``[outputs, width]`` of the first neurons, and its bias ``[outputs]``, by ridge regression.

    Args:
        moments: of the calibration tokens, without inputs.
        order: of big's neurons.
        width: how many of them there are.
    """
    take = np.r_[0, 1 + order[:width]]
    gram = moments.gram[np.ix_(take, take)].astype(np.float64)
    gram[np.diag_indices_from(gram)] += np.r_[1e-6 * gram[0, 0], np.full(width, ridge(moments.gram))]
    solved = np.linalg.solve(gram, moments.cross[take].astype(np.float64))
    return solved[1:].T.astype(np.float32), solved[0].astype(np.float32)


def ridge(gram: Matrix) -> float:
    """What is added to each neuron's second moment."""
    return RIDGE * float(np.diag(gram)[1:].mean())


def divide(errors: NDArray[np.float64], total: int) -> NDArray[np.intp]:
    """Give each layer a number of units such that the sum of errors is least: an integer programme, solved exactly.

    Args:
        errors: ``[layers, units + 1]``, of each layer with 0, 1, ... units.
        total: units of all layers, at most.

    Returns:
        Units ``[layers]``.
    """
    layers, most = errors.shape[0], errors.shape[1] - 1
    best = np.full((layers + 1, total + 1), np.inf)
    best[0] = 0
    chosen = np.zeros((layers, total + 1), np.intp)
    for layer in range(layers):
        for units in range(most + 1):
            if units > total:
                break
            reached = best[layer, : total + 1 - units] + errors[layer, units]
            better = reached < best[layer + 1, units:]
            best[layer + 1, units:][better] = reached[better]
            chosen[layer, units:][better] = units
    found, left = np.zeros(layers, np.intp), total
    for layer in reversed(range(layers)):
        found[layer] = chosen[layer, left]
        left -= found[layer]
    return found
