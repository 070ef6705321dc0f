"""What is examined of everything that keeps state by slot: how it is asked for, and slots that live with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic

from trtllm_core.checkpoint import Tokenizer
from trtllm_core.errors import ConfigError
from trtllm_core.plugin import Example
from trtllm_core.testing.kit import Conformance, passed_over, require
from trtllm_core.testing.letters import letter_tokenizer
from trtllm_core.testing.lives import G, Life, Rig, Setting
from trtllm_core.testing.subject import Case, Kind, Subject, resolve

END_IDS = (9,)
"""Of the tokenizer that kits make themselves; random texts hold it."""


class SlotSubject(Conformance, Generic[G]):
    """What a kit of slots examines, and how: the plugin, the requests to try, and lives of slots with it."""

    params: ClassVar[Sequence[Mapping[str, Any]]] = ()
    """Parameters to try. Where neither these nor ``sampling`` are given, the plugin's own ``examples`` are tried."""
    sampling: ClassVar[Sequence[Mapping[str, Any]]] = ()
    """Fields of SamplingConfig to try, each with each of ``params``."""
    vocab_size: ClassVar[int] = 40
    """Of the model that is tried. Random texts are mostly of its first tokens."""
    tokenizer: ClassVar[Tokenizer | None] = None
    """Of the model that is tried; None makes one of ``vocab_size`` tokens that are words of letters."""
    lives: ClassVar[int] = 4
    """How many random lives each check tries."""

    offers: ClassVar[frozenset[str]] = frozenset({"text"})
    """What a plugin may need, and is given."""
    kind: ClassVar[Kind]
    rig: type[G]
    _subject: ClassVar[Subject]
    _refusal: ClassVar[str]

    @classmethod
    def subject(cls) -> Subject:
        """What is examined, found once for each kit."""
        if "_subject" not in vars(cls):
            cls._subject = resolve(cls.kind, cls.given(), cls.name)
        return cls._subject

    @classmethod
    def cases(cls) -> list[Case]:
        """The requests to try."""
        subject, ends = cls.subject(), cls.setting().end_ids
        return [subject.case(each.params, each.sampling, ends) for each in cls.examples()]

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """How to ask for it."""
        if cls.params or cls.sampling:
            return [Example(one, other) for one in cls.params or ({},) for other in cls.sampling or ({},)]
        return cls.subject().make().examples or (Example(),)

    @classmethod
    def setting(cls, device: str = "cpu") -> Setting:
        """What rigs are made for."""
        tokenizer = cls.tokenizer or letter_tokenizer(cls.vocab_size, END_IDS)
        return Setting(cls.subject(), cls.vocab_size, tokenizer, device)

    def life(self, seed: int, chunk: int = 1, device: str = "cpu") -> Life[G]:
        """A new plugin, whose slots have lived a little."""
        self.skip_unless_it_can_run()
        life = Life(self.rig(self.setting(device)), self.cases(), chunk, seed)
        life.grow(3)
        return life

    def skip_unless_it_can_run(self) -> None:
        """What a plugin needs beside tokens and text is not here."""
        capabilities = self.subject().make().capabilities
        missing = capabilities.needs - self.offers
        if missing:
            passed_over(f"it needs {', '.join(sorted(missing))}, which this kit cannot give it")
        if why := self.refusal():
            passed_over(f"it cannot be asked for like this: {why}")

    @classmethod
    def refusal(cls) -> str:
        """Why the requests to try are refused; empty where they are not. Found once for each kit."""
        if "_refusal" not in vars(cls):
            try:
                for case in cls.cases():
                    cls.begins(case)
                cls._refusal = ""
            except ConfigError as error:
                cls._refusal = str(error)
        return cls._refusal

    def speculates(self) -> bool:
        """Whether it says that it can take part in verify steps, and give tokens back."""
        return getattr(self.subject().make().capabilities, "speculation", "rewind") != "none"

    def skip_unless_it_speculates(self) -> None:
        """Nothing of the sort is promised."""
        if not self.speculates():
            passed_over('it declares speculation="none": requests that use it verify no drafts')

    def on_device(self) -> bool:
        """Whether it works on tensors of all rows at once."""
        return True

    def same(self, rig: Rig[Any], other: Rig[Any], after: str) -> None:
        """Both must answer alike for all live slots."""
        self.same_answers(rig, rig.answers(list(rig.branches)), other.answers(list(rig.branches)), after)

    def same_answers(self, rig: Rig[Any], found: Mapping[int, Any], due: Mapping[int, Any], after: str) -> None:
        """The answers must be those that are due."""
        for slot, answer in found.items():
            difference = rig.difference(answer, due[slot])
            branch = rig.branches[slot]
            text = f"text {list(branch.prompt)} + {list(branch.generated)}"
            require(not difference, f"{after}: {difference} (slot {slot}, {branch.case}, {text})")

    @classmethod
    def begins(cls, case: Case) -> None:
        """A request begins.

        Raises:
            ConfigError: the plugin refuses it.
        """
        Life(cls.rig(cls.setting()), [case])

    def test_it_can_be_asked_for(self) -> None:
        """A request with these parameters and fields is planned, and begins."""
        why = self.refusal()
        if why and not self.params and self.subject().takes_objects():
            passed_over(f"its parameters are no JSON, give them by `params`: {why}")
        require(not why, f"it refuses the requests to try: {why}; give other `params` or `sampling`")
