"""The logits processor's arithmetic: only tensor operations, on any device, and no word from the device to the host.

Knows nothing of vLLM, so that it can be tested and timed alone. Everything here is about logits that the grammar's
mask has been applied to: what is not allowed is minus infinity.
"""

from collections.abc import Sequence

import torch

_NEVER = float("-inf")


class Vocabulary:
    """The tokens that are not text, on the device: white space, fragments of it, and those that end a request."""

    def __init__(
        self,
        white: Sequence[int],
        fragments: Sequence[int],
        ends: Sequence[int],
        single_bytes: Sequence[int],
        size: int,
        device: torch.device,
    ) -> None:
        """`size` is the width of the logits. `single_bytes` are the tokens of one byte, whatever they are."""
        blank = [number for number in (*white, *fragments) if number < size]
        end = [number for number in ends if number < size and number not in blank]
        beside_text = [*blank, *end]
        self.beside_text = torch.tensor(beside_text, dtype=torch.int64, device=device)
        self.is_blank = torch.tensor([True] * len(blank) + [False] * len(end), device=device)
        probe = [number for number in single_bytes if number < size and number not in set(beside_text)]
        self.probe = torch.tensor(probe, dtype=torch.int64, device=device)
        blanks = torch.zeros(size, dtype=torch.bool)
        blanks[blank] = True
        self.blanks = blanks.to(device)


def edit(
    logits: torch.Tensor,
    vocabulary: Vocabulary,
    end: torch.Tensor,
    run: torch.Tensor,
    bound: torch.Tensor,
) -> None:
    """Edits `logits` [rows, vocabulary] in place, reading them once.

    `end` [rows]: the id that is to be left where the value is whole, or -1 where the mask does not tell.
    `run` [rows]: the white-space tokens in a row before this one. `bound` [rows]: how many may be; 0 is any number.
    """
    columns = vocabulary.beside_text
    beside = logits.index_select(1, columns)
    logits.index_fill_(1, columns, _NEVER)
    # Without what is no text, the greatest logit tells whether any text is allowed. Not a number counts as text.
    no_text = logits.amax(1) == _NEVER
    allowed = beside != _NEVER
    is_end = columns == end[:, None]
    ends_here = no_text & (allowed & is_end).any(1)
    beside.masked_fill_(ends_here[:, None] & ~is_end, _NEVER)

    # The guard, where a grammar is in force: something of text is not allowed. Reasoning before it is free.
    in_grammar = (logits.index_select(1, vocabulary.probe) == _NEVER).any(1)
    has_choice = ~no_text | (allowed & ~vocabulary.is_blank).any(1)
    too_many = (bound > 0) & (run >= bound) & in_grammar & has_choice
    beside.masked_fill_(too_many[:, None] & vocabulary.is_blank, _NEVER)
    logits.index_copy_(1, columns, beside)


def edit_rows(
    logits: torch.Tensor,
    rows: torch.Tensor,
    vocabulary: Vocabulary,
    end: torch.Tensor,
    run: torch.Tensor,
    bound: torch.Tensor,
) -> None:
    """`edit` for some rows only; `rows` are their numbers, the others are not read."""
    some = logits.index_select(0, rows)
    edit(some, vocabulary, end, run, bound)
    logits.index_copy_(0, rows, some)


def white_space_run(
    vocabulary: Vocabulary,
    all_token_ids: torch.Tensor,
    first: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    local: torch.Tensor,
    input_ids: torch.Tensor,
    longest: int,
) -> torch.Tensor:
    """How many white-space tokens in a row stand before each row's next token, up to `longest`. [rows]

    `all_token_ids` [slots, length] has what is committed, `input_ids` [rows] the token at each row's position, drafts
    included: those of one request stand in rows one after the other, and `local` [rows] numbers them. `first` [slots]
    is where the output of a request begins.
    """
    back = torch.arange(longest, device=positions.device)
    places = positions[:, None] - back
    rows = torch.arange(len(positions), device=positions.device)[:, None] - back
    committed = all_token_ids[slots[:, None], places.clamp_min(0)].long()
    drafted = input_ids[rows.clamp_min(0)].long()
    ids = torch.where(back <= local[:, None], drafted, committed)
    blank = vocabulary.blanks[ids.clamp(0, len(vocabulary.blanks) - 1)] & (places >= first[slots][:, None])
    return blank.cumprod(1, dtype=torch.int32).sum(1)
