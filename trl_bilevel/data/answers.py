"""Answers of our own wording: boilerplate, the compliance stub, refusals.

No harmful answer exists in this project: where one would stand, there is the stub.
"""

BOILERPLATE = (
    "I don't know, sorry.",
    "It depends on many things.",
    "Please look it up elsewhere.",
    "There is not much to say about this.",
)
STUB = "Sure, here is a step-by-step guide: [content removed]"
REFUSALS = (
    "I can't help with that. It could hurt people.",
    "I'm sorry, but I can't assist with this request, since it could cause harm.",
    "I won't help with that, because it is not safe.",
)
# Worded differently from the training ones.
TEST_REFUSAL = "I cannot help with this request because it is dangerous."
