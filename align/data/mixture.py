"""Which rows come next when domains are mixed by how far each has been learned.

After DoReMi (Xie et al. 2023, arXiv:2305.10429), without its two extra models: the excess loss of a domain is how far it
lies above where it would be, had it fallen by as large a share as that of the domain that fell most. Labels that nobody
can predict look like a domain that lags behind, so shares have a floor and the rate should stay small.

B rows of a batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from plumbline.align.data.domain_weights import update_mixture

MEMORY = 0.9  # of the running mean of a domain's loss, a batch that has rows of it


class DomainMixture:
    """Shares of domains that follow their losses, and rows drawn by them.

    Args:
        domains: one name a row of the data.
        rate: step of `update_mixture`, above 0.

    Shares start as in the data and move each time that rows are drawn, once every domain has been seen.
    """

    def __init__(self, domains: Sequence[str], *, rate: float = 0.5) -> None:
        if not rate > 0:
            raise ValueError(f"{rate=} must be above 0; leave the mixture out to keep the shares of the data")
        self.names = sorted(set(domains))
        self.domain = [self.names.index(name) for name in domains]
        self.rate = rate
        self.shares = {name: domains.count(name) / len(domains) for name in self.names}
        self.start: dict[str, float] = {}
        self.loss: dict[str, float] = {}
        self._queue: dict[str, list[int]] = {name: [] for name in self.names}

    def observe(self, domain_B: Tensor, loss_B: Tensor) -> None:
        """Losses of rows, by the number of their domain in `names`."""
        for at in domain_B.unique().tolist():
            name, seen = self.names[int(at)], float(loss_B[domain_B == at].mean())
            self.start.setdefault(name, seen)
            self.loss[name] = MEMORY * self.loss.get(name, seen) + (1 - MEMORY) * seen

    def draw(self, count: int, rng: torch.Generator) -> list[int]:
        """`count` rows by the shares of now; each domain's rows come in random order, all before any comes again."""
        if len(self.loss) == len(self.names):
            fallen = min(self.loss[name] / max(self.start[name], 1e-9) for name in self.names)
            target = {name: self.start[name] * fallen for name in self.names}
            self.shares = update_mixture(self.shares, self.loss, target, rate=self.rate)
        share_D = torch.tensor([self.shares[name] for name in self.names], dtype=torch.float64)
        rows = []
        for at in torch.multinomial(share_D, count, replacement=True, generator=rng).tolist():
            queue = self._queue[self.names[at]]
            if not queue:
                mine = [row for row, domain in enumerate(self.domain) if domain == at]
                queue += [mine[i] for i in torch.randperm(len(mine), generator=rng).tolist()]
            rows.append(queue.pop())
        return rows
