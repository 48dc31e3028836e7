"""Chat templates in their published syntax, and what each makes of one conversation.

The templates are written here, with the marks, roles and white space of the models that they are
named after. `SCORED` has what is scored, by hand.
"""

# system, user, assistant, user, assistant
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One plus one?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "And a line\nbreak?"},
    {"role": "assistant", "content": "  indented\nlines"},
]
# The same with reasoning, as records have it for models that think.
THOUGHT = [
    {"role": "user", "content": "One plus one?"},
    {"role": "assistant", "content": "<think>\nAdd them.\n</think>\n\nTwo."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "<think>\nCheck.\n</think>\n\nYes."},
]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Its marks leave the end of the turn out.
CHATML_MARKED_SHORT = CHATML_MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
LLAMA_3 = (
    "{% for message in messages %}{% if loop.first %}<|begin_of_text|>{% endif %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = none %}{% endif %}"
    "{% for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}<s>[INST] {% if loop.first and system %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n"
    "{% endif %}{{ message['content'] | trim }} [/INST]{% else %} {{ message['content'] | trim }} </s>{% endif %}"
    "{% endfor %}"
)
MISTRAL = (
    "<s>{% set ns = namespace(system='') %}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{% set ns.system = message['content'] + '\\n\\n' %}{% elif message['role'] == 'user' %}"
    "[INST] {{ ns.system }}{{ message['content'] }}[/INST]{% set ns.system = '' %}"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] | trim }}</s>"
    "{% else %}{{ raise_exception('Only user, assistant and system roles are supported') }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PHI_3 = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
)
GEMMA = (
    "<bos>{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Reasoning of earlier turns is removed; the begin of an answer opens the reasoning.
NEMOTRON_THINKING = (
    "{% set ns = namespace(last_user=-1) %}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% set ns.last_user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% set answer = message['content'].split('</think>')[-1] | trim %}"
    "{% set thought = message['content'].split('</think>')[0].split('<think>')[-1] | trim "
    "if '</think>' in message['content'] else '' %}"
    "{% if loop.index0 > ns.last_user and thought %}<think>\n{{ thought }}\n</think>\n{{ answer }}"
    "{% else %}<think></think>{{ answer }}{% endif %}"
    "{% else %}{{ message['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% else %}<think>\n{% endif %}"
    "{% endif %}"
)
# Reasoning of earlier turns is removed; the begin of an answer leaves the reasoning to the model.
QWEN_THINKING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and not loop.last %}{{ message['content'].split('</think>')[-1] | trim }}"
    "{% else %}{{ message['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEEPSEEK = (
    "<|begin_of_sentence|>{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}<|User|>{{ message['content'] }}{% elif message['role'] == 'assistant' %}"
    "<|Assistant|>{{ message['content'] }}<|end_of_sentence|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)
GRANITE = (
    "{% for message in messages %}<|start_of_role|>{{ message['role'] }}<|end_of_role|>{{ message['content'] }}"
    "<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)
COMMAND_R = (
    "<BOS_TOKEN>{% for message in messages %}<|START_OF_TURN_TOKEN|>"
    "<|{{ {'user': 'USER', 'assistant': 'CHATBOT', 'system': 'SYSTEM'}[message['role']] }}_TOKEN|>"
    "{{ message['content'] | trim }}<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)
# Roles in words; an answer ends with the end-of-text token.
TULU = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<|end|>", "<|endoftext|>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<think>", "</think>"),
    *("<|begin_of_sentence|>", "<|User|>", "<|Assistant|>", "<|end_of_sentence|>"),
    *("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
    *("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
)

BOTH = "Two.", "  indented\nlines"
TRIMMED = "Two.", "indented\nlines"
# Template, turns, and every scored text.
SCORED = {
    "chatml": (CHATML, CONVERSATION, [f"{each}<|im_end|>" for each in BOTH]),
    "chatml, marked": (CHATML_MARKED, CONVERSATION, [f"{each}<|im_end|>" for each in BOTH]),
    "chatml, marked without its end": (CHATML_MARKED_SHORT, CONVERSATION, [f"{each}<|im_end|>" for each in BOTH]),
    "llama 3": (LLAMA_3, CONVERSATION, [f"{each}<|eot_id|>" for each in TRIMMED]),
    "llama 2": (LLAMA_2, CONVERSATION, [f" {each} </s>" for each in TRIMMED]),
    "mistral": (MISTRAL, CONVERSATION, [f" {each}</s>" for each in TRIMMED]),
    "zephyr": (ZEPHYR, CONVERSATION, [f"{each}</s>" for each in BOTH]),
    # The end of the text after every rendering is no part of a turn in the middle.
    "phi 3": (PHI_3, CONVERSATION, ["Two.<|end|>", "  indented\nlines<|end|>\n<|endoftext|>"]),
    "gemma": (GEMMA, CONVERSATION[1:], [f"{each}<end_of_turn>" for each in TRIMMED]),
    # The first answer is not what the model writes there: it thinks first.
    "nemotron, thinking": (NEMOTRON_THINKING, THOUGHT, ["Check.\n</think>\nYes.<|im_end|>"]),
    "nemotron, without thoughts": (
        NEMOTRON_THINKING,
        CONVERSATION,
        ["</think>Two.<|im_end|>", "</think>indented\nlines<|im_end|>"],
    ),
    "qwen, thinking": (QWEN_THINKING, THOUGHT, ["<think>\nCheck.\n</think>\n\nYes.<|im_end|>"]),
    "deepseek": (DEEPSEEK, CONVERSATION, [f"{each}<|end_of_sentence|>" for each in BOTH]),
    "granite": (GRANITE, CONVERSATION, [f"{each}<|end_of_text|>" for each in BOTH]),
    "command r": (COMMAND_R, CONVERSATION, [f"{each}<|END_OF_TURN_TOKEN|>" for each in TRIMMED]),
    "tulu": (TULU, CONVERSATION, [f"{each}</s>" for each in BOTH]),
}
