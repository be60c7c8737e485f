-- The outbox counts the versions of scores, as it does for every service: this one needs no table of its own for them.

-- score.chain stays as it is, and nothing writes to it any more. What was counted there is handed over to the outbox, which
-- knows only what it still stores: events that are retired are in score.chain alone.
COMMENT ON TABLE score.chain IS
    'The last version of each score that was published by a release that counted by itself. Handed over to outbox.aggregate;
nothing reads or writes it any more.';

-- As outbox.number_by takes them. Of a person who is gone the score has ended.
CREATE VIEW score.handed_over AS
SELECT c.person_id AS id, c.version, NOT EXISTS (SELECT FROM score.person p WHERE p.id = c.person_id) AS ended
FROM score.chain c;

-- Hands the versions over, once; from then on it does nothing. The programs call it before they publish, since the outbox may
-- be installed, or updated, after this schema. It waits for transactions that write events. With the owner's rights.
CREATE FUNCTION score.hand_over_chains() RETURNS void
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF (SELECT t.numbered_by FROM outbox.aggregate_type t WHERE t.aggregate_type = 'score') = 'outbox' THEN
        RETURN;
    END IF;
    PERFORM outbox.number_by('score', 'outbox', 'TABLE score.handed_over');
EXCEPTION WHEN insufficient_privilege THEN
    RAISE EXCEPTION 'the owner of the schema score may not hand its versions over to the outbox'
        USING ERRCODE = 'object_not_in_prerequisite_state',
              HINT = 'As the owner of the schema outbox, who may read score.handed_over: SELECT outbox.number_by(''score'', '
                     '''outbox'', ''TABLE score.handed_over'').';
END
$$;
REVOKE EXECUTE ON FUNCTION score.hand_over_chains() FROM PUBLIC;

-- What each program needs and no more: the rights of before but those on score.chain, and this.
CREATE OR REPLACE FUNCTION score.grant_projector(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
DECLARE
    schema regnamespace;
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA score TO %s', role);
    EXECUTE format('GRANT SELECT ON score.migration, score.model TO %s', role);
    EXECUTE format('GRANT UPDATE (since) ON score.model TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION score.erase_old(uuid[]), score.hold_shadow(), score.hand_over_chains() TO %s',
                   role);
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
DO $$
DECLARE
    role regrole;
BEGIN
    FOR role IN
        SELECT DISTINCT r.grantee::regrole FROM pg_class c, aclexplode(c.relacl) r
        WHERE c.oid = 'score.chain'::regclass AND r.grantee <> c.relowner AND r.grantee <> 0
    LOOP
        EXECUTE format('REVOKE ALL ON score.chain FROM %s', role);
    END LOOP;
END
$$;
