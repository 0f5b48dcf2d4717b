"""Prompts of the sessions of one engine: keys and values computed once, and shared by all that have the same."""

from collections import Counter

from minwm.errors import InputError, SessionError
from minwm.models.backbones import Backbone
from minwm.models.transformer import Prompt, Transformer


class SharedPrompts:
    """Counts who has which; what nobody has any more is forgotten."""

    def __init__(self, backbone: Backbone, model: Transformer) -> None:
        """model: the backbone's, as the engine runs it."""
        self._backbone, self._model = backbone, model
        self._prompts: dict[str, Prompt] = {}
        self._users: Counter[str] = Counter()

    def borrow(self, caption: str) -> Prompt:
        """One and the same for all who have it. Raises SessionError for one that is too long."""
        if caption not in self._prompts:
            try:
                text = self._backbone.encode([caption])
            except InputError as error:
                raise SessionError(str(error)) from error
            self._prompts[caption] = self._model.prompt(text)
        self._users[caption] += 1
        return self._prompts[caption]

    def give_back(self, caption: str) -> None:
        """One user less."""
        self._users[caption] -= 1
        if not self._users[caption]:
            del self._users[caption], self._prompts[caption]
