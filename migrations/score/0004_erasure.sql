-- Erasure: a person who is deleted goes from the model of before, too.

-- The model that was live before the last exchange (score_old) hears of nothing any more, so the live one's
-- deletions are carried out in it as well, items included. Nothing to do when there is none, or when it is
-- dropped meanwhile. By the primary key. Runs with its owner's rights: nobody else needs any on the old model.
CREATE FUNCTION score.erase_old(persons uuid[]) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF to_regclass('score_old.person') IS NULL THEN
        RETURN;
    END IF;
    EXECUTE 'DELETE FROM score_old.person WHERE id = ANY ($1)' USING persons;
EXCEPTION WHEN OTHERS THEN
    IF to_regclass('score_old.person') IS NOT NULL THEN
        RAISE;
    END IF;
END
$$;
REVOKE EXECUTE ON FUNCTION score.erase_old(uuid[]) FROM PUBLIC;

-- What each program needs and no more: the rights of before, and this.
CREATE OR REPLACE FUNCTION score.grant_projector(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
DECLARE
    schema regnamespace;
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA score TO %s', role);
    EXECUTE format('GRANT SELECT ON score.migration, score.model TO %s', role);
    EXECUTE format('GRANT UPDATE (since) ON score.model TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE ON score.chain TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION score.erase_old(uuid[]) TO %s', role);
    FOREACH schema IN ARRAY array_remove(ARRAY['score'::regnamespace, to_regnamespace('score_shadow')], NULL) LOOP
        EXECUTE format('GRANT USAGE ON SCHEMA %s TO %s', schema, role);
        EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON %s.person, %1$s.entry TO %s', schema, role);
    END LOOP;
END
$$;
-- Whoever writes to the model already goes on to do so.
SELECT score.grant_projector(r.grantee::regrole)
FROM pg_class c, aclexplode(c.relacl) r
WHERE c.oid = 'score.person'::regclass AND r.privilege_type = 'INSERT' AND r.grantee <> c.relowner;
