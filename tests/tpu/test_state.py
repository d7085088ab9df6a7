"""Rules of the state machine, one by one, against the simulated cloud; its table in the docs."""

import dataclasses

import pytest
from scaling_dit.tpu.observations import (
    Answer,
    Observation,
    Phase,
    Report,
    Resource,
    Work,
    Worker,
    summarize,
)
from scaling_dit.tpu.state import REFUSED, After, Do, Limits, Stage, State, from_dict, resumed, step

from tests.support import tpu_jobs
from tools import tpu_states

BACKENDS = pytest.mark.parametrize("backend", ["queued", "compute"])


@pytest.fixture
def world(tmp_path):
    """Returns a world with a job of these fields."""
    return lambda guarded=True, total=200, **changes: tpu_jobs.World(
        tmp_path, tpu_jobs.job(**changes), 3, guarded=guarded, total=total
    )


def test_the_page_has_the_tables_of_the_code():
    assert tpu_states.PAGE.read_text() == tpu_states.page(), "run python -m tools.tpu_states"


def test_a_state_survives_its_file():
    state = State(stage=Stage.DELETE, after=After.NEXT, zone=2, used=12.5, machines="1,2", verdict="why")
    assert from_dict(state.to_dict()) == state
    assert resumed(state) == state and resumed(State(stage=Stage.RUN)).stage is Stage.FIND
    for broken in ({}, {**state.to_dict(), "new": 1}, {**state.to_dict(), "stage": "NO"}):
        with pytest.raises((KeyError, TypeError)):
            from_dict(broken)


@BACKENDS
def test_a_preempted_job_resumes_where_it_saved(world, backend):
    made = world(backend=backend)
    assert not made.turns(100, lambda: made.workers.saved >= 60)
    made.cloud.preempt(made.running())
    assert not made.turns(60, lambda: made.state.attempt == 2 and made.state.stage is Stage.RUN)
    worker = next(iter(made.workers.known.values()))
    assert worker["from"] == made.workers.saved >= 60
    assert made.turns(300) and made.state.stage is Stage.DONE
    assert made.cloud.created == 2 and not made.cloud.made


def test_zones_are_tried_in_their_order_with_growing_pauses(world):
    made = world()
    made.cloud.deny = ["capacity"] * 5
    tried, times = [], []
    assert not made.turns(400, lambda: made.running() is not None)
    for call in made.cloud.calls:
        if "create" in call:
            tried.append(call[-1])
    assert [zone.rpartition("=")[2] for zone in tried[:6]] == [*tpu_jobs.ZONES, *tpu_jobs.ZONES]
    times = [float(line.rpartition(" in ")[2].split()[0]) for line in made.said if "next request" in line]
    assert times == [60, 120, 240, 480, 960]


def test_patience_ends_in_one_zone_only_while_there_are_others(world):
    made = world(patience=0.5)
    made.cloud.provision = (1e6, 1e6)
    assert not made.turns(60, lambda: made.state.zone == 1 and made.resource is not None)
    assert made.resource.zone == tpu_jobs.ZONES[1]
    alone = world(patience=0.5, zones=tpu_jobs.ZONES[:1])
    alone.cloud.provision = (1e6, 1e6)
    assert not alone.turns(300) and alone.cloud.created == 1 and alone.state.used == 0


@BACKENDS
def test_a_user_s_suspension_is_left_alone(world, backend):
    made = world(backend=backend)
    made.turns(100, lambda: made.workers.saved >= 20)
    made.cloud.suspend(made.running())
    assert made.turns(30)
    assert made.state.stage is Stage.PAUSED and made.cloud.created == 1 and made.resource is not None
    assert "a user suspended" in made.said[-1]


def test_a_resource_of_somebody_else_is_not_touched(world):
    made = world()
    made.turns(100, lambda: made.workers.saved >= 20)
    other = tpu_jobs.job(owner="another")
    made.job, made.store.values = other, None
    made.launch()
    calls = len(made.cloud.calls)
    assert made.turns(5) and made.state.stage is Stage.STOPPED
    assert "not this job's" in made.said[-1]
    assert not any(word in call for call in made.cloud.calls[calls:] for word in ("delete", "create", "ssh"))
    assert made.running()


@BACKENDS
@pytest.mark.parametrize("lost", ["before", "after"])
def test_a_lost_answer_of_create_is_found_by_its_name(world, backend, lost):
    made = world(backend=backend)
    made.cloud.lose = lost
    assert made.turns(400) and made.state.stage is Stage.DONE and made.cloud.created == 1


@BACKENDS
@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize("limit", [{"hours": 1.0}, {"hours": 50.0, "dollars": 20.0}])
def test_a_budget_of_hours_or_dollars_is_kept(world, backend, limit, guarded):
    one = tpu_jobs.with_budget(tpu_jobs.job(backend=backend), **limit)
    made = world(guarded, total=10**6, backend=backend, budget=one.budget)
    assert one.hours == 1.0
    assert made.turns(400) and made.state.stage is Stage.STOPPED and not made.cloud.made
    assert 0.75 * 3600 < made.cloud.billed("first") <= 3600
    assert "budget is used up" in made.state.verdict
    # It could save before.
    assert made.workers.saved > 80


def test_restarts_are_limited(world):
    made = world(budget=dataclasses.replace(tpu_jobs.job().budget, restarts=2), total=10**6)
    for _ in range(3):
        made.turns(200, lambda: made.state.stage is Stage.RUN and made.launcher.report.work is Work.RUNNING)
        made.cloud.preempt(made.running())
        made.turns(3)
    assert made.turns(50) and made.state.stage is Stage.STOPPED and made.cloud.created == 3
    assert "2 restarts are used up; last: preempted" in made.state.verdict


@pytest.mark.parametrize(
    "code, attempts, verdict",
    [
        (2, 1, "exit code 2"),
        (3, 1, "exit code 3"),
        (4, 1, "exit code 4"),
        (1, 2, "for the second time"),
        (130, 1, "a user interrupted it on a worker"),
        (137, 2, ""),
    ],
)
def test_a_job_that_fails_at_a_step_again_is_given_up(world, code, attempts, verdict):
    made = world(total=100)
    made.workers.fails = (50, code)
    assert made.turns(300) and made.state.stage is Stage.STOPPED and made.state.failed
    assert verdict in made.state.verdict and "step 50" in made.state.verdict
    assert made.state.attempt == attempts and made.cloud.created == 1 and not made.cloud.made


def test_exit_code_75_resumes_however_often_within_the_restarts(world):
    made = world(total=100)
    for _ in range(4):
        made.turns(40, lambda: made.launcher.report.work is Work.RUNNING)
        made.workers.end(75, made.cloud.now)
        made.turns(2)
    assert made.turns(300) and made.state.stage is Stage.DONE
    assert made.state.attempt == 5 and made.state.restarts == 4 and made.cloud.created == 1


def test_storage_that_refuses_is_waited_for_an_hour_at_one_step(world):
    made = world(total=100)
    made.workers.fails = (50, 74)
    began = made.cloud.now
    assert made.turns(300) and made.state.stage is Stage.STOPPED and not made.cloud.made
    assert "its disk or bucket refused for 6" in made.state.verdict and "step 50" in made.state.verdict
    # A start every five minutes and more, none of which takes a restart of the budget.
    assert made.state.restarts == 0 and 5 <= made.state.attempt - 1 <= 12
    assert 3600 <= made.cloud.now - began < 3 * 3600


def test_a_job_that_gets_past_a_refusal_goes_on(world):
    made = world(total=200)
    for saved in (40, 60, 80):
        assert not made.turns(60, lambda at=saved: made.workers.saved >= at)
        made.workers.end(74, made.cloud.now)
        made.turns(2)
        # Not at once.
        assert made.state.trouble == REFUSED and "refused" in made.state.verdict
        made.cloud.advance(1800.0)
    assert made.turns(300) and made.state.stage is Stage.DONE
    assert made.state.attempt == 4 and made.cloud.created == 1 and made.state.refused_at == -2
    assert made.state.restarts == 0


def test_machines_that_a_group_replaced_are_prepared_again(world):
    made = world(backend="compute")
    made.cloud.repairs = True
    made.turns(100, lambda: made.workers.saved >= 40)
    made.cloud.preempt(made.running())
    assert made.turns(400) and made.state.stage is Stage.DONE and made.state.attempt >= 2
    # The job saw it either as a preemption, or by the machines' new ids.
    assert made.state.restarts == made.state.attempt - 1


def test_a_job_deleted_from_outside_is_not_asked_for_again(world):
    made = world()
    made.turns(100, lambda: made.workers.saved >= 20)
    made.cloud._begin_delete(made.running())
    assert made.turns(30) and made.state.stage is Stage.STOPPED and made.cloud.created == 1
    assert "deleted from outside" in made.state.verdict


def test_a_failing_set_up_is_tried_three_times(world):
    made = world()
    made.workers.broken = 100
    assert made.turns(60) and made.state.stage is Stage.STOPPED and not made.cloud.made
    assert "set-up failed 3 times" in made.state.verdict


def test_a_worker_that_cannot_be_reached_is_noticed_although_gcloud_ends_well(world):
    made = world()
    made.turns(100, lambda: made.workers.saved >= 20)
    made.running().machines[1].status = "HUNG"
    assert not made.turns(40, lambda: made.state.stage is Stage.DELETE)
    assert "not all workers answer, for 15 minutes" in made.state.verdict
    assert made.turns(400) and made.state.stage is Stage.DONE and made.cloud.created == 2
    early = world()
    early.turns(30, lambda: early.running() is not None)
    early.running().machines[1].status = "HUNG"
    assert early.turns(30) and "the set-up failed 3 times: 1 of 2 workers were reached" in early.state.verdict


def test_an_unreachable_control_plane_decides_nothing(world):
    made = world()
    made.turns(100, lambda: made.workers.saved >= 20)
    made.cloud.deaf = 10**6
    assert not made.turns(50) and made.resource and made.cloud.created == 1
    made.cloud.deaf = 0
    assert made.turns(300) and made.state.stage is Stage.DONE


def test_of_several_resources_one_is_kept(world):
    one, found = tpu_jobs.job(), (0, 1, 2)
    seen = Observation(5.0, Resource(Phase.READY), found=found)
    after, actions = step(one, State(zone=1), seen, Limits())
    assert after.stage is Stage.FIND and after.zone == 1
    assert [(action.do, action.zone) for action in actions] == [(Do.DELETE, 0), (Do.DELETE, 2)]
    stopped = dataclasses.replace(seen, stop=True)
    _, actions = step(one, State(zone=1), stopped, Limits())
    assert [action.zone for action in actions] == [0, 1, 2]


def test_a_permanent_refusal_ends_the_job_at_once(world):
    made = world()
    made.cloud.deny = ["permission"]
    assert made.turns(10) and made.state.stage is Stage.STOPPED and made.cloud.created == 0
    assert "PERMISSION_DENIED" in made.state.verdict
    assert Answer.WRONG.value == "refused, as it will be again"


def worker(name, work, code=None, step=5, attempt=1, age=0.0):
    return Worker(name, attempt, work, code, step, age)


@pytest.mark.parametrize(
    "workers, report",
    [
        ([worker("a", Work.RUNNING)], Report(Work.SILENT, step=5)),
        ([worker("a", Work.RUNNING)] * 2, Report(Work.SILENT, step=5)),
        (
            [worker("a", Work.RUNNING, step=3), worker("b", Work.RUNNING, step=7)],
            Report(Work.RUNNING, step=7),
        ),
        ([worker("a", Work.RUNNING), worker("b", Work.RUNNING, attempt=2)], Report(Work.NONE, step=5)),
        ([worker("a", Work.ENDED, 0), worker("b", Work.ENDED, 0)], Report(Work.ENDED, 0, 5)),
        ([worker("a", Work.ENDED, 75), worker("b", Work.ENDED, 137)], Report(Work.ENDED, 75, 5)),
        ([worker("a", Work.ENDED, 75), worker("b", Work.ENDED, 3)], Report(Work.ENDED, 3, 5)),
        ([worker("a", Work.ENDED, 0), worker("b", Work.ENDED, 1)], Report(Work.ENDED, 1, 5)),
        # One host's storage, mistake, or user, of which the other tells only that it lost somebody.
        ([worker("a", Work.ENDED, 75), worker("b", Work.ENDED, 74)], Report(Work.ENDED, 74, 5)),
        ([worker("a", Work.ENDED, 130), worker("b", Work.ENDED, 75)], Report(Work.ENDED, 130, 5)),
        ([worker("a", Work.ENDED, 75), worker("b", Work.ENDED, 1)], Report(Work.ENDED, 1, 5)),
        ([worker("a", Work.ENDED, 74), worker("b", Work.ENDED, 130)], Report(Work.ENDED, 130, 5)),
        ([worker("a", Work.ENDED, 137), worker("b", Work.ENDED, 0)], Report(Work.ENDED, 137, 5)),
        ([worker("a", Work.ENDED, 75), worker("b", Work.RUNNING)], Report(Work.RUNNING, step=5)),
        ([worker("a", Work.ENDED, 75, age=601), worker("b", Work.RUNNING)], Report(Work.GONE, step=5)),
        ([worker("a", Work.ENDED, 75), worker("b", Work.GONE)], Report(Work.GONE, step=5)),
    ],
)
def test_what_workers_say_together(workers, report):
    assert summarize(tuple(workers), 2, 1) == report
