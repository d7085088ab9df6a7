"""TPU jobs that survive preemption: `scaling-dit tpu VERB`, or `python -m scaling_dit.tpu VERB`.

The files, in the order to read them:

    job.py          a job: its slice, zones, budgets and the command it runs
    observations.py what a launcher can know about a job's resource and its workers
    state.py        the state machine: (job, state, observation) -> (state, actions), pure
    backends/       the two control planes of Google Cloud: commands to run, and how to read their answers
    remote.py       the shell scripts that run on the workers
    commands.py     quoting, redaction, and running gcloud
    launcher.py     the loop that observes and acts
    store.py        what a launcher keeps on this machine
    checks.py       what is checked before anything is created
    verbs.py        the verbs

Files here import one another relatively: the folder stands at the root of the repository and is installed as
`scaling_dit.tpu`, and type checkers read it where it stands.
"""
