"""Measure the exchange of data x latents among local processes: `python bench/plan/collectives.py [most processes]`.

Each layout of 2 to 8 gloo processes takes the collectives of a training step, and counts the bytes that each sends by
the formulas of sae_lab/planning/exchange.py. Prints seconds and bytes/s.
"""

import statistics
import sys
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

from sae_lab.planning.exchange import exchange
from sae_lab.planning.sizes import SAESize

D, F, K, B = 256, 8192, 16, 2048
REPEATS = 5
SAE = SAESize(2 * F * D + D, 2 * F * D, 0, 8 * F, F, D, D, D, True, K)


def collectives(n: int, m: int) -> float:
    """Take the collectives of a step, and return the seconds."""
    mesh = init_device_mesh("cpu", (n, m), mesh_dim_names=("data", "latents"))
    data, latents = mesh.get_group("data"), mesh.get_group("latents")
    own, b = SAE.shard(m), B // n
    gradient, fired = torch.zeros(own.parameters), torch.zeros(own.n_latents, dtype=torch.uint8)
    candidates, parts = torch.zeros(b * K), [torch.zeros(b * K) for _ in range(m)]
    sums, seconds = torch.zeros(b, D), []
    others = [rank for rank in range(n * m) if rank != dist.get_rank()]
    rows = {rank: (torch.zeros(b // (n * m), D), torch.zeros(b // (n * m), D)) for rank in others}
    for _ in range(REPEATS):
        dist.barrier()
        start = time.perf_counter()
        if n > 1:
            dist.all_reduce(gradient, group=data)
            dist.all_reduce(fired, group=data)
        if m > 1:
            dist.all_gather(parts, candidates, group=latents)
            dist.all_reduce(sums, group=latents)
            dist.all_reduce(sums, group=latents)
        sent = [dist.isend(rows[rank][0], rank) for rank in others]  # each rank has computed its share of the rows
        for work in [*sent, *(dist.irecv(rows[rank][1], rank) for rank in others)]:
            work.wait()
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def run(rank: int, n: int, m: int, store_port: int, results: "mp.SimpleQueue") -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", store_port, n * m, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n * m)
    seconds = collectives(n, m)
    if rank == 0:
        results.put(seconds)
    dist.destroy_process_group()


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def main() -> None:
    most = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    context = mp.get_context("spawn")
    print(
        "| data x latents | MB that a rank sends | ms | MB/s of a rank | GB/s of all |\n|---|---|---|---|---|",
        flush=True,
    )
    for size in (s for s in (2, 4, 8) if s <= most):
        for m in (m for m in (1, 2, 4, 8) if size % m == 0 and m <= size):
            n, results = size // m, context.SimpleQueue()
            sent = exchange(SAE, B, n, m, 4 * D, False).bytes
            mp.spawn(run, (n, m, free_port(), results), nprocs=size)
            seconds = results.get()
            print(
                f"| {n} x {m} | {sent / 1e6:.2f} | {1e3 * seconds:.1f} | {sent / seconds / 1e6:,.0f} "
                f"| {size * sent / seconds / 1e9:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
