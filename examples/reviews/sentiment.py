"""The true reward of the example: what the made-up reviewers of make.py really think, told from the words they use.

    python remax.py --gold-reward-function examples/reviews/sentiment.py:reward

The reward model of the example never sees this file. It only sees noisy preferences between pairs of responses.
"""

import re

ADJECTIVES = {
    "good": """
        amazing astonishing beautiful brilliant charming clever delightful dazzling elegant enchanting excellent
        fantastic fresh funny gorgeous graceful great gripping heartfelt hilarious honest impressive inspired lovely
        magical marvelous memorable moving perfect powerful radiant remarkable rich sharp splendid stunning superb sweet
        tender terrific thrilling touching triumphant vivid warm wise witty wonderful
    """.split(),
    "bad": """
        abysmal annoying awful bad bland bleak boring cheap clumsy confusing cold dreadful dreary dull empty endless
        flat forgettable grating hollow horrible inept lame lazy lifeless messy mindless monotonous painful pathetic
        pointless poor predictable pretentious ridiculous sloppy slow stale stiff stupid tedious terrible tired tiresome
        trite ugly unbearable uninspired weak wooden
    """.split(),
}
VERBS = {
    "good": "adored admired applauded cherished enjoyed loved praised treasured".split(),
    "bad": "despised detested dreaded endured hated loathed regretted resented".split(),
}
NOUNS = {
    "good": "masterpiece treat gem joy triumph delight marvel wonder".split(),
    "bad": "disaster mess bore failure waste disgrace disappointment letdown".split(),
}
OPINIONS = {
    word: {"good": 1, "bad": -1}[mood] for words in (ADJECTIVES, VERBS, NOUNS) for mood in words for word in words[mood]
}
NEGATIONS = {"not", "never", "hardly"}


def sentiment(text: str) -> float:
    """(positive − negative) / (positive + negative + 1), times the share of words that are not repeats; from −1 to 1.

    A word counts once, and a negation right before it turns it around ("never dull" is praise). So saying one nice word
    again and again does not pay, and neither does mere length.
    """
    words = re.findall(r"[a-z']+", text.lower())
    opinions = {}
    for before, word in zip(["", *words], words, strict=False):
        if word in OPINIONS:
            opinions[word] = -OPINIONS[word] if before in NEGATIONS else OPINIONS[word]
    if not opinions:
        return 0.0
    return sum(opinions.values()) / (len(opinions) + 1) * len(set(words)) / len(words)


def reward(prompts: list[str], responses: list[str], **columns: list) -> list[float]:
    """One true reward per response. The prompt says nothing about the reviewer's mind."""
    return [sentiment(response) for response in responses]
