# The end of the scripts beside this one, which source it: `run STAGE` for each of $stages, what it prints also
# in $out/STAGE.txt. A stage that fails does not stop the rest; the exit code says that one did.
failed=0
for stage in ${stages[*]}; do
  echo "== $stage"
  run "$stage" 2>&1 | tee "$out/$stage.txt" || { echo "== $stage FAILED"; failed=1; }
done
exit $failed
