"""Minimise a function with scipy: each generation is evaluated on all workers."""

from itertools import pairwise

from scipy.optimize import differential_evolution

from ostap_parallel import Pool


def rosenbrock(x):
    return sum(100 * (b - a**2) ** 2 + (1 - a) ** 2 for a, b in pairwise(x))


if __name__ == "__main__":
    with Pool(servers="auto") as pool:  # the hosts of your configuration, if there are any
        found = differential_evolution(
            rosenbrock, [(-2, 2)] * 3, workers=pool.map, updating="deferred"
        )
    print("minimum at", *(round(float(x), 3) for x in found.x))
