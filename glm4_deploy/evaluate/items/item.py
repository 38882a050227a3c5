from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        prompt: the question with its instruction; "Answer:" or a chat template follows.
        answer: the text of a right answer.
        choices: the possible answers, if the question offers some.
        schemas: JSON, for calls: name of a function to the schema of its arguments.
        place: where in the text the answer stands, 0 (start) to 1 (end), for kinds with long texts.
    """

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    schemas: str = ""
    place: float = 0.0
