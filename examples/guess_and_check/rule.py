"""The reward of the example: a program can tell whether an answer is right."""


def reward(prompts: list[str], responses: list[str], answer: list[str], **columns: list) -> list[float]:
    """1 where the last guess is the right equation with its "!", otherwise 0. `answer` is a column of the data."""
    last_guesses = [response.split(", ")[-1] for response in responses]
    return [float(guess == equation + "!") for guess, equation in zip(last_guesses, answer, strict=True)]
