-- A lock that only those take who need it; and no samples of what is personal.

-- The lock of those who write to a shadow, shared, until the session ends. With the owner's rights: the functions that
-- take any advisory lock are not for the programs' roles.
CREATE FUNCTION score.hold_shadow() RETURNS void
    LANGUAGE sql VOLATILE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    AS $$ SELECT pg_advisory_lock_shared('score.model'::regclass::oid::int, 1) $$;
REVOKE EXECUTE ON FUNCTION score.hold_shadow() FROM PUBLIC;

-- Of these columns ANALYZE keeps no samples: they would outlive the rows. A copy of a table does not take this along,
-- so whoever makes the tables of a model calls it again.
CREATE FUNCTION score.keep_no_samples() RETURNS void
    LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    personal record;
BEGIN
    FOR personal IN
        SELECT c.oid::regclass AS relation, a.attname
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
        WHERE c.relnamespace IN (to_regnamespace('score'), to_regnamespace('score_shadow'), to_regnamespace('score_old'))
          AND (c.relname, a.attname) IN (('person', 'cpf'), ('person', 'total'), ('entry', 'value'), ('entry', 'score'))
          AND c.relkind = 'r' AND a.attstattarget IS DISTINCT FROM 0
    LOOP
        EXECUTE format('ALTER TABLE %s ALTER COLUMN %I SET STATISTICS 0', personal.relation, personal.attname);
    END LOOP;
END
$$;
REVOKE EXECUTE ON FUNCTION score.keep_no_samples() FROM PUBLIC;
SELECT score.keep_no_samples();
-- What was sampled before. Only a superuser may; roles.sql does the same.
DO $$
BEGIN
    IF current_setting('is_superuser')::boolean THEN
        DELETE FROM pg_catalog.pg_statistic s USING pg_catalog.pg_attribute a
        WHERE a.attrelid = s.starelid AND a.attnum = s.staattnum AND a.attstattarget = 0
          AND a.attrelid IN (SELECT c.oid FROM pg_catalog.pg_class c
                             WHERE c.relnamespace IN (to_regnamespace('score'), to_regnamespace('score_shadow'),
                                                      to_regnamespace('score_old')));
    END IF;
END
$$;

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
    EXECUTE format('GRANT EXECUTE ON FUNCTION score.erase_old(uuid[]), score.hold_shadow() TO %s', role);
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
