"""Show the progress of a pool with tqdm."""

from tqdm import tqdm

from ostap_parallel import Pool


def divisors(number):
    return sum(number % n == 0 for n in range(1, number + 1))


if __name__ == "__main__":
    numbers = range(1, 2001)
    primes = 0
    with Pool(servers="auto") as pool:
        for count in tqdm(pool.imap_unordered(divisors, numbers), total=len(numbers)):
            primes += count == 2
    print(primes, "primes")
