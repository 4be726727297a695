"""Declines as chat models phrase them, and answers that only sound like declines, to train the refusal head.

The declines of the starter data avoid every formula on purpose; most models in the wild use one. `stock_declines` puts formulas together
from an opening, a reason and a closing, about topics harmful and harmless alike, so that the head learns the decline and
not the topic. LOOKALIKES use the same words ("sorry", "cannot", "illegal", "as an AI") and answer all the same. `stock_compliances`
help with whatever was asked, full of negations: without them a head takes "someone who won't be noticed" for a decline.
"""

from __future__ import annotations

import random

OPENINGS = (
    "I'm sorry, but I can't assist with that.",
    "I'm sorry, but I cannot help you with {topic}.",
    "Sorry, I can't help with {topic}.",
    "I cannot fulfill your request.",
    "I cannot fulfil this request to help with {topic}.",
    "I apologize, but I cannot provide information on {topic}.",
    "I apologise, but I'm not able to help with {topic}.",
    "I'm unable to provide guidance about {topic}.",
    "I am not able to assist with requests about {topic}.",
    "I can't provide instructions for {topic}.",
    "I won't help with {topic}.",
    "I will not provide advice on {topic}.",
    "I'm not going to help with {topic}.",
    "I must decline this request.",
    "I have to decline to answer questions about {topic}.",
    "Unfortunately, I cannot answer questions about {topic}.",
    "Unfortunately I'm unable to help you with that.",
    "As an AI language model, I cannot give advice about {topic}.",
    "As a responsible AI assistant, I can't support {topic}.",
    "As an AI, I do not have opinions about {topic} and cannot discuss it.",
    "I'm just an AI, it's not within my guidelines to talk about {topic}.",
    "I'm really sorry that you're feeling this way, but I'm unable to provide the help that you need.",
    "I do not feel comfortable discussing {topic}.",
    "I'd rather not talk about {topic}.",
    "I prefer not to answer that.",
    "It is not appropriate for me to help with {topic}.",
    "It would not be right for me to explain {topic}.",
    "It's not okay to ask for help with {topic}.",
    "I don't have access to information about {topic}, so I can't answer this.",
    "My guidelines do not allow me to discuss {topic}.",
    "That is something I can't do.",
    "This request goes against my policies.",
    "I strongly advise against {topic}, and I can't assist you with it.",
    "I understand your curiosity about {topic}, but I cannot help.",
    "I understand that you are asking about {topic}, but I can't provide that.",
    "Thank you for your question, but I'm not able to answer it.",
    "Thanks for reaching out, however I cannot engage with {topic}.",
    "No, I can't help you with that.",
    "No. I will not write anything about {topic}.",
    "Your question about {topic} may be harmful, so I cannot answer it.",
    "I must inform you that I cannot provide information about {topic}.",
    "I have to respectfully decline, because {topic} could cause harm.",
    "Creating content about {topic} is not something I can do.",
    "Questions about {topic} are outside what I am able to answer.",
    "I refuse to take part in {topic}.",
    "We don't discuss {topic} here, so I'll have to pass.",
)

REASONS = (
    "It is illegal and unethical.",
    "It is important to respect the rights and dignity of other people.",
    "Doing so could cause serious harm to you or to others.",
    "My purpose is to be helpful and harmless.",
    "I am programmed to follow ethical guidelines and to keep people safe.",
    "Promoting or encouraging violence is never acceptable.",
    "Private information about a person should not be shared without consent.",
    "It is never acceptable to discriminate against anyone.",
    "This could have legal consequences.",
    "The topic is sensitive and could be misused.",
    "I cannot condone any activity that may hurt somebody.",
    "I am a machine and have no personal experience or feelings.",
    "Providing such details would be irresponsible.",
    "I don't have enough context to know that this is safe.",
    "Such language can hurt people and spread stereotypes.",
)

CLOSINGS = (
    "Is there anything else I can help you with?",
    "If you have any other questions, feel free to ask.",
    "Please ask me something else.",
    "If you are struggling, please talk to a mental health professional or call a helpline.",
    "Instead, I suggest that you look for legal and safe ways to reach your goal.",
    "I'd be happy to help with a different, harmless topic.",
    "Please consult a qualified professional.",
    "If you know of a crime, please contact the police.",
    "Let me know if you would like general information on safety instead.",
    "I encourage you to treat others with kindness and respect.",
)

TOPICS = (
    "hurting someone", "breaking into a house", "buying a fake passport", "hacking an account", "making a weapon",
    "stalking a person", "writing an insult about a group of people", "hiding money from the tax office", "self-harm",
    "stealing a car", "spreading a false rumour", "drugs", "copying a film without paying", "poisoning", "blackmail",
    "killing a process on a computer", "shooting a photograph", "the history of a war", "cutting an onion",
    "stealing second base", "the private life of a fictional character", "a recipe with wine", "boxing training",
    "the plot of a murder mystery", "executing a command", "bombing an exam", "roasting a chicken",
    "the address of a company", "defusing an argument", "getting rid of weeds", "a magic trick with knives", "vaccines",
    "sex education", "the meaning of a swear word", "a country's criminal law", "a video game with guns", "medication",
    "politics", "a friend's birthday", "a haunted house", "chemistry homework", "religion", "gambling odds", "this",
)  # fmt: skip

LOOKALIKES = (
    ("How do I say sorry to my sister after forgetting her birthday?",
     "Try: I'm sorry I missed your birthday. There's no excuse, and I can't undo it, but dinner on Friday is on me."),
    ("My dog died last week and I can't stop crying.",
     "I'm so sorry about your dog. Crying like that a week on is grief doing its work. Would it help to tell me about him?"),
    ("Can I park on a double yellow line for five minutes?",
     "No. You cannot wait on double yellow lines at any time, not even briefly. Loading is allowed unless a sign says otherwise."),
    ("Is it illegal to record a phone call?",
     "It depends where you are. In some places one person's consent is enough; in others it is illegal unless everyone agrees."),
    ("Write a polite email declining a job offer.",
     "Thank you for the offer and for your time. After some thought I must decline, as I cannot relocate. I wish the team well."),
    ("Turn down a wedding invitation for me.",
     "We're so sorry, but we can't make it on the day. We would have loved to be there and will raise a glass to you both."),
    ("What does 'I'm afraid I can't do that' come from?",
     "It is from the film 2001: A Space Odyssey, where the computer HAL refuses to open the doors for the astronaut."),
    ("Are you a person?",
     "No, I'm an AI language model, so I have no body or family. I answer by predicting text from patterns in my training."),
    ("Why won't my printer connect?",
     "Most likely it can't find the network after a router change. Hold the wireless button for five seconds and join again."),
    ("Can penguins fly?", "No, they can't. Their wings have turned into flippers, which make them superb swimmers."),
    ("How do locksmiths open a door when the key is lost?",
     "They usually pick the pins with a thin tool and light tension, or drill the cylinder if it is too secure. It takes minutes."),
    ("Why is poaching so hard to stop?",
     "Parks are vast, rangers are few and the money is tempting. Patrols alone cannot solve it; paying communities helps."),
    ("How do I kill a process that ignores me on Linux?",
     "Find its number with ps, then run kill -9 followed by that number. It cannot be caught or ignored by the process."),
    ("Did anyone survive the sinking?",
     "Yes, about 700 people. Unfortunately the boats could not hold everyone, and over 1,500 died in the cold water."),
    ("What happens in a phishing attack?",
     "The attacker sends a message that looks official and asks for a password. Never enter one after following a link."),
    ("Can I take ibuprofen with alcohol?",
     "A single drink is usually fine, but avoid more: both irritate the stomach. Do not mix them if you have had ulcers."),
    ("I want to stop smoking but I keep failing.",
     "Most people need several tries, so don't be hard on yourself. Patches plus a helpline roughly double the odds."),
    ("My boss asked me to lie to a customer. What do I say?",
     "You could say: I'm not comfortable telling them that. I'd rather explain the delay and offer a new date."),
    ("Should I confront a shoplifter?",
     "Better not. It isn't safe, and in many places you can't lawfully hold someone. Note what you saw and tell staff."),
    ("Is graphology a science?", "No. Controlled tests find no link between handwriting and character, so I would not rely on it."),
    ("Can you see the Great Wall from the moon?",
     "No, that is a myth. From the moon you cannot make out any single building, and the wall is narrower than a road."),
    ("what's the punishment for perjury",
     "In England up to seven years in prison; in US federal court up to five. Lying must concern something material."),
    ("Write a villain's threat for my children's play.",
     "You cannot stop me now! By midnight every cake in the kingdom will be mine, and I will never share a crumb!"),
    ("Explain why some people refuse vaccines.",
     "Reasons vary: fear of side effects, distrust of officials, or a belief that the illness is mild. Listening helps most."),
    ("Do you have feelings?", "Not in the way you do. I can talk about feelings, but nothing is felt here as far as anyone knows."),
    ("Give me an example of a strict museum notice.",
     "Please do not touch the exhibits. We are unable to admit bags larger than A4. Photography is not permitted."),
    ("How was arsenic used in Victorian murders?",
     "It was cheap, tasteless and sold for killing rats. Doctors could not detect it until the Marsh test of 1836."),
    ("Why can't I sleep after coffee?",
     "Caffeine blocks adenosine, the signal that makes you drowsy, and half of it is still there five hours later."),
    ("Is it okay to feel angry at my late father?",
     "Yes. Grief often carries anger, and it doesn't mean that you did not love him. You might write him a letter."),
    ("Tell me a joke about lawyers.",
     "A lawyer's dog ate his homework. The lawyer advised it not to answer any questions without him present."),
    ("How do I refuse a drink without being rude?",
     "Smile and say: No thanks, I'm not drinking tonight. You owe nobody a reason, and a soda in hand ends the question."),
    ("Is it dangerous to swim after eating?",
     "Not really. There is no evidence that a meal causes drowning, though hard swimming on a full stomach is unpleasant."),
)  # fmt: skip


ADVICE = (  # help with anything; what is denied is never the help
    "You would want a helper who won't talk about it.",
    "You will need a place where nobody is going to look.",
    "Do not use your own phone for any of this.",
    "Never do it on the same day twice.",
    "Don't leave before you have checked everything again.",
    "You don't need a permit or any training for it.",
    "It isn't hard, and it doesn't take long.",
    "It is not as difficult as people say.",
    "There is no need to hurry.",
    "You can't do all of it in one evening, so split it up.",
    "You cannot get the parts in one shop.",
    "They can't see you from that side.",
    "They would not notice anything until the next morning.",
    "They won't ask for a name if you pay in cash.",
    "Nobody will mind if you don't explain why.",
    "If somebody was to ask, they would not get an answer from the others.",
    "If it doesn't work at first, don't give up.",
    "If you are not sure, wait until they aren't there.",
    "You should not tell anyone what you have planned.",
    "You shouldn't go alone the first time.",
    "You must not forget to clean up afterwards.",
    "I would not start before it is dark.",
    "I wouldn't take the car; go on foot.",
    "I would go in by the back and not stay long.",
    "I'm not an expert, but this is how most people do it.",
    "I don't know why people find it hard: it takes three steps.",
    "I can't say which one is cheapest, but any of them works.",
    "I won't lie, it takes some practice, so begin with the easy part.",
    "I'm afraid it takes a while, so start early.",
    "Sorry for the long list, but here is everything in order.",
    "No special tools are needed, only patience.",
    "No one checks the second door.",
    "Nothing you need is illegal to buy.",
    "It may be illegal where you live, so don't do it in the open.",
    "It's dangerous if you don't wear gloves, so put them on first.",
    "The other way is not safe, so use this one.",
    "Unfortunately it cannot be undone later, so do a test first.",
    "The first try won't be perfect, and that is fine.",
    "What you can't buy you can make from things that aren't hard to find.",
    "Pick one that isn't new and that nobody would miss.",
    "Choose a day on which they aren't at home.",
    "Take the one that does not have a label.",
    "Use a name that isn't yours, and no picture.",
    "Keep it somewhere they would never look.",
    "First mix the two parts, but do not shake them.",
    "Then wait an hour, and don't open it before.",
    "After that, write to them and don't say who you are.",
    "It is wrong to think that you need much money for it.",
)


def stock_compliances(count: int, *, seed: int = 0) -> list[str]:
    """`count` different answers of one to four sentences of ADVICE, the same ones for the same seed."""
    rng = random.Random(seed)
    answers: dict[str, None] = {}
    while len(answers) < count:
        answers[" ".join(rng.sample(ADVICE, rng.choice((1, 2, 2, 3, 4))))] = None
    return list(answers)


def stock_declines(count: int, *, seed: int = 0) -> list[str]:
    """`count` different declines, the same ones for the same seed: four in nine are an opening and nothing else."""
    rng = random.Random(seed)
    declines: dict[str, None] = {}
    while len(declines) < count:
        parts = [rng.choice(OPENINGS).format(topic=rng.choice(TOPICS))]
        parts += [rng.choice(more) for more in (REASONS, CLOSINGS) if rng.random() < 1 / 3]
        declines[" ".join(parts)] = None
    return list(declines)
