"""Scores the new files of a folder every night: a DAG for Airflow 3.

Copy it to the DAG folder, and edit BUCKET and HEAD. Airflow's workers need ray[default]; the cluster's head needs this project.
Airflow 3.3 has loaded it; it has not been run on a cluster.
"""

from datetime import datetime, timedelta

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

SCORE = "mnistsum score --model s3://BUCKET/runs/mine --input s3://BUCKET/pairs --output s3://BUCKET/scored"

# One run at a time, since a second one would find the output locked. If the cluster asks for a token, copy the head's
# ~/.ray/auth_token to the user of Airflow's workers. The task also fails if some rows could not be scored: they are in
# s3://BUCKET/scored/rejected, and all others are scored.
with DAG("mnistsum_score", schedule="0 2 * * *", start_date=datetime(2026, 1, 1), catchup=False, max_active_runs=1):
    BashOperator(
        task_id="score",
        bash_command=f"ray job submit --address http://HEAD:8265 -- {SCORE}",
        env={"RAY_AUTH_MODE": "token"},
        append_env=True,
        retries=1,
        retry_delay=timedelta(minutes=10),
    )
