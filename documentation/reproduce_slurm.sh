#!/bin/bash
# Template: one array task a row of a published table. Adapt the lines marked <-.
#
#   nnssl_reproduce diffcl LA-4 --list | grep -v '^#' > rows.txt
#   sbatch --array=1-$(wc -l < rows.txt) documentation/reproduce_slurm.sh rows.txt
#   nnssl_reproduce diffcl LA-4 --report        # when all tasks are done
#
#SBATCH --job-name=nnssl_reproduce
#SBATCH --gres=gpu:1                 # <-
#SBATCH --cpus-per-task=8            # <-
#SBATCH --mem=48G                    # <-
#SBATCH --time=24:00:00              # <- a run that does not fit goes on in the next job, see below
#SBATCH --signal=USR1@300            # to srun's processes, 300 s before the time is over: save and exit with 75
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

. .venv/bin/activate                                       # <-
export nnUNet_raw=$HOME/raw nnUNet_preprocessed=$HOME/preprocessed nnUNet_results=$HOME/results  # <- shared by all nodes
export nnUNet_n_proc_DA=$((SLURM_CPUS_PER_TASK - 1))

command=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$1")
echo "$command"
eval "srun $command"; code=$?
if [ $code -eq 75 ]; then  # stopped by the signal: the same command goes on in the next job
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit $code
