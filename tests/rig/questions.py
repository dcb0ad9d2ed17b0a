"""The prompts on which engines are compared."""

QUESTIONS = [
    "What is the capital of France?",
    "Name three primary colours.",
    "Why is the sky blue?",
    "Write a haiku about rain.",
    "What is 12 times 12?",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
    "List four planets.",
    "Explain photosynthesis in one sentence.",
    "What do bees make?",
    "Give me a recipe for tea.",
    "What is the opposite of hot?",
    "How many legs has a spider?",
    "Name a river in Egypt.",
    "What is a noun?",
    "Finish the sentence: the early bird",
    "What is H2O?",
    "Naïve café — ¿qué significa «déjà vu»? 日本語 🙂",
    "def fibonacci(n):",
    "Summarise: " + "The old man walked slowly along the shore, counting his steps. " * 12,
]
