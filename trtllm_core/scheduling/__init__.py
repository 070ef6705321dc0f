"""Who runs in the next step: the scheduler that static batches and the executor share. It has no thread."""

from trtllm_core.scheduling.queue import WaitingQueue
from trtllm_core.scheduling.scheduler import Scheduler
from trtllm_core.scheduling.ticket import Ticket, Turn

__all__ = ["Scheduler", "Ticket", "Turn", "WaitingQueue"]
