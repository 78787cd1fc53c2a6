"""The one door: words on one side, an engine's token ids on the other.

`Frontend` serves many models over an engine port and belongs to one asyncio loop; `LLM` runs one model in this process,
over the same bytes of shared memory that everybody else reads.
"""

from vai.llm.answer import Completion as Completion
from vai.llm.answer import Delta as Delta
from vai.llm.frontend import Frontend as Frontend
from vai.llm.frontend import Model as Model
from vai.llm.frontend import connect as connect
from vai.llm.library import Library as Library
from vai.llm.offline import LLM as LLM
from vai.llm.words import ModelCard as ModelCard
from vai.text.chat import Reading as Reading
from vai.text.grammar import GrammarSpec as GrammarSpec
from vai.text.tools import MAX_TOOLS as MAX_TOOLS
from vai.text.tools import ToolCall as ToolCall
from vai.text.tools import ToolChoice as ToolChoice
from vai.text.tools import ToolList as ToolList
from vai.text.tools import Tools as Tools
from vai.text.tools import offered as offered
from vai.text.tools import whole_calls as whole_calls
