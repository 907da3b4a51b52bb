"""A failed job is tried again a few times; a job that lost its worker is always tried again."""

from mpcache.collection.jobs import Job, JobQueue

FIRST, SECOND = Job(0, 8, ()), Job(1, 8, ())


def test_a_job_is_given_up_after_three_failures() -> None:
    queue = JobQueue([FIRST, SECOND], tries=3)
    assert queue.take() == FIRST
    assert queue.put_back_failed(FIRST)
    assert queue.take() == SECOND, "others come first"
    assert queue.take() == FIRST
    assert queue.put_back_failed(FIRST)
    assert queue.failures(FIRST) == 2
    assert queue.take() == FIRST
    assert not queue.put_back_failed(FIRST)
    assert not queue
    assert queue.failures(SECOND) == 0


def test_a_job_whose_worker_was_at_fault_has_not_failed() -> None:
    queue = JobQueue([FIRST], tries=1)
    for _ in range(5):
        queue.put_back(queue.take())
    assert len(queue) == 1
    assert queue.failures(FIRST) == 0
