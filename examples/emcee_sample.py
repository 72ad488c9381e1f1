"""Sample a distribution with emcee: the probabilities of all walkers are computed in parallel."""

import emcee
import numpy as np

from ostap_parallel import Pool

MEAN, WIDTH = 3.0, 0.5


def log_probability(x):
    return -0.5 * float(((x - MEAN) ** 2).sum()) / WIDTH**2


if __name__ == "__main__":
    np.random.seed(1)
    start = MEAN + np.random.normal(size=(16, 2))
    with Pool(servers="auto") as pool:
        sampler = emcee.EnsembleSampler(16, 2, log_probability, pool=pool)
        sampler.run_mcmc(start, 200)
    sample = sampler.get_chain(discard=50, flat=True)
    print(f"mean {sample.mean():.1f}, width {sample.std():.1f}")
