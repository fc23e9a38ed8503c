"""The sample that a run shows at each validation;
imported only if training.sample_prompt is set.
"""

from model import TrainingModule
from tinylm.generate.chat import format_prompt
from tinylm.generate.engine import Engine
from tinylm.rows.conversation import CHAT_STAGES
from tinylm.rows.template_factory import make_template
from tinylm.tokenizer.base import Tokenizer


def sample_text(module: TrainingModule, tokenizer: Tokenizer) -> str:
    """The prompt in brackets, as --show-rows prints it, and the model's continuation;
    of a fine-tuned model its answer, asked for in the template.
    """
    config, prompt = module.config, module.config.training.sample_prompt
    assert prompt is not None
    data, template = config.data, None
    if module.stage in CHAT_STAGES:
        template = make_template(data.template, tokenizer, tools=data.tools)
    engine = Engine(module.decoder, tokenizer, tools=data.tools)
    formatted = format_prompt(engine, prompt, template, system=module.system)
    completions = engine.generate(formatted.prompt, config.sampling, stop_ids=formatted.stop_ids)
    return f"⟦{prompt}⟧{completions[0].text}"
