-- What the consumers have applied of the baselines: the same rows, one version higher.
DO $$
DECLARE
    model regnamespace;
BEGIN
    UPDATE inbox.aggregate SET version = version + 1, recent = pg_temp.short(pg_temp.baseline_id(aggregate_id::uuid)),
                               last_event_id = pg_temp.baseline_id(aggregate_id::uuid)
    WHERE NOT ended;
    FOREACH model IN ARRAY array_remove(ARRAY['score'::regnamespace, to_regnamespace('score_shadow')], NULL) LOOP
        EXECUTE format('UPDATE %s.person SET version = version + 1', model);
    END LOOP;
END
$$;
