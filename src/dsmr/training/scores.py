"""Score a split: all metrics of an evaluation, and the results by piece."""

import torch
from torch import Tensor, nn

from dsmr.batch import IGNORED, Segment
from dsmr.data.datamodule import MusicData
from dsmr.results.piece_table import PieceTable
from dsmr.training.losses import NotFiniteError, piece_position, token_nll
from dsmr.training.metrics import PieceNLL, PositionPerplexity, RecallPerplexity, TokenNLL


class SplitScores(nn.Module):
    """Metrics of a validation or test split, summed over its segments and over all processes."""

    note_on_V: Tensor
    family_V: Tensor

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.nll, self.positions = TokenNLL(), PositionPerplexity()
        self.recall: RecallPerplexity | None = None
        self.pieces: PieceNLL | None = None
        self.piece_table: PieceTable | None = None  # of the last split that was scored; None without a datamodule
        self.data: MusicData | None = None
        self._first_bad = torch.full((2,), -1)  # piece and position of the first NLL that is NaN or Inf
        self.register_buffer("note_on_V", torch.zeros(vocab_size, dtype=torch.bool), persistent=False)
        self.register_buffer("family_V", torch.zeros(vocab_size, dtype=torch.long), persistent=False)

    def use_data(self, data: MusicData) -> None:
        """Take note-ons, token families, pieces and recall distances from the data."""
        self.data, device = data, self.note_on_V.device
        self.note_on_V.copy_(torch.from_numpy(data.note_on_mask))
        self.family_V.copy_(torch.from_numpy(data.token_families))
        self.pieces = PieceNLL(len(data.store.pieces), len(data.families)).to(device)
        self.recall = RecallPerplexity(data.recall_distances).to(device) if data.recall_distances else None

    def reset(self) -> None:
        """Begin a split."""
        self._first_bad = torch.full((2,), -1, device=self.note_on_V.device)
        self.piece_table = None
        for metric in (self.nll, self.positions, self.pieces, self.recall):
            if metric:
                metric.reset()

    def update(self, batch: Segment, logits_BTV: Tensor) -> None:
        """Add a segment of every lane."""
        nll_BT = token_nll(logits_BTV, batch.targets_BT)
        is_real_BT = batch.targets_BT != IGNORED
        known_BT = batch.targets_BT.clamp(min=0)
        bad_B = ~nll_BT.isfinite().all(dim=1)
        lane = bad_B.int().argmax()
        here = torch.stack([batch.piece_B[lane], batch.position_B[lane]])  # on the device: read once, in `compute`
        self._first_bad = torch.where(bad_B.any() & (self._first_bad[0] < 0), here, self._first_bad)
        self.nll.update(nll_BT, is_real_BT, self.note_on_V[known_BT], batch.microseconds_B)
        self.positions.update(nll_BT, is_real_BT, batch.position_B)
        if self.pieces:
            where = (batch.piece_B, batch.position_B, self.family_V[known_BT], batch.microseconds_B)
            self.pieces.update(nll_BT, is_real_BT, *where)
        if self.recall:
            self.recall.update(nll_BT, batch.distance_BT)

    def compute(self, split: str) -> dict[str, Tensor]:
        """Return all metrics by name, and fill `piece_table`; raises `NotFiniteError` if the NLL is NaN or Inf."""
        metrics = self.nll.compute()
        if not bool(metrics["nll"].isfinite()) and bool(metrics["tokens"]):
            place = piece_position(self.data, *self._first_bad)
            message = f"the {split} loss is not finite, first in {place}; the weights cannot be used in this precision"
            raise NotFiniteError(message, is_undone=False)
        metrics |= {f"position/{name}": value for name, value in self.positions.compute().items() if value.isfinite()}
        if self.recall:
            metrics |= {f"recall/{name}": value for name, value in self.recall.compute().items()}
        if self.pieces:
            assert self.data is not None
            table = self.piece_table = build_piece_table(self.pieces, self.data)
            families = zip(table.families, table.nll_PF.sum(axis=0), table.tokens_PF.sum(axis=0), strict=True)
            metrics |= {f"family/{name}": torch.tensor(nll / tokens) for name, nll, tokens in families if tokens}
        return metrics


def build_piece_table(metric: PieceNLL, data: MusicData) -> PieceTable:
    """Return the results by piece, of all processes."""
    sums = {name: total.cpu().double().numpy() for name, total in metric.compute().items()}
    names = [piece.name for piece in data.store.pieces]
    return PieceTable.from_sums(**sums, names=names, families=data.families, starts=PositionPerplexity.STARTS)
