-- A read model that can be rebuilt beside the live one, and then takes its place.

-- The last version of the aggregate score/<person> that was appended to the outbox. It says what was
-- published and not what the read model holds, so it is a table of its own: it outlives every model, and
-- the person as well, whose chain would otherwise begin again at 1 if they came back. Versions are taken
-- by raising it, under its row's lock, before the events take their positions.
CREATE TABLE score.chain (
    person_id uuid   PRIMARY KEY,
    version   bigint NOT NULL CHECK (version >= 1)
) WITH (fillfactor = 80);
INSERT INTO score.chain (person_id, version)
SELECT id, score_version FROM score.person WHERE score_version > 0 ORDER BY id;
ALTER TABLE score.person DROP COLUMN score_version;

-- Beside the live model and the shadow there may be
--   old     the one that was live before the exchange, in the schema score_old, kept until it is dropped.
--   ending  one that was aborted: its consumer's rows in the inbox are being removed.
-- The second model is score-2: the sequence gives each rebuild a name that was never used.
--   queue   the name of a queue of its own, as long as it has one: a shadow's, which goes when the shadow
--           is live or aborted. The live model's queue is the one that the program is told.
ALTER TABLE score.model DROP CONSTRAINT model_role_check;
ALTER TABLE score.model ADD CHECK (role IN ('live', 'shadow', 'old', 'ending'));
ALTER TABLE score.model ADD COLUMN queue text;
CREATE SEQUENCE score.model_number START 2;

-- The tables of a model, each before those that refer to it. Everything below goes by this list.
CREATE FUNCTION score.model_tables() RETURNS text[]
    LANGUAGE sql IMMUTABLE AS $$
    SELECT ARRAY['person', 'entry']
$$;

-- What the tables of a model in this schema look like, one line for each column, constraint, index and
-- right, without the schema's own name. Two models whose lines are the same can take each other's place.
CREATE FUNCTION score.model_shape(schema text) RETURNS SETOF text
    LANGUAGE plpgsql AS $$
DECLARE
    before text := current_setting('search_path');
BEGIN
    -- Names in this schema come without it.
    PERFORM set_config('search_path', quote_ident(schema), true);
    RETURN QUERY
    WITH t AS (
        SELECT c.oid, c.relname, c.relowner, c.relacl, c.reloptions
        FROM pg_class c
        WHERE c.relnamespace = to_regnamespace(quote_ident(schema)) AND c.relname = ANY (score.model_tables())
    )
    SELECT concat_ws(' ', 'table', t.relname, 'owner', t.relowner::regrole, t.reloptions::text) FROM t
    UNION ALL
    SELECT concat_ws(' ', 'column', t.relname, a.attname, format_type(a.atttypid, a.atttypmod),
                     CASE WHEN a.attnotnull THEN 'not null' END, 'default ' || pg_get_expr(d.adbin, d.adrelid),
                     a.attacl::text)
    FROM t JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped
           LEFT JOIN pg_attrdef d ON (d.adrelid, d.adnum) = (a.attrelid, a.attnum)
    UNION ALL
    SELECT concat_ws(' ', 'constraint', t.relname, n.conname, pg_get_constraintdef(n.oid))
    FROM t JOIN pg_constraint n ON n.conrelid = t.oid
    UNION ALL
    SELECT concat_ws(' ', 'index', t.relname, pg_get_indexdef(i.indexrelid, 0, true))
    FROM t JOIN pg_index i ON i.indrelid = t.oid
    UNION ALL
    SELECT concat_ws(' ', 'right', t.relname, r.grantee::regrole, r.privilege_type)
    FROM t, aclexplode(t.relacl) r
    WHERE r.grantee <> t.relowner
    ORDER BY 1;
    PERFORM set_config('search_path', before, true);
END
$$;

-- Makes the schema score_shadow with empty tables like the live ones, from the catalog, so that the two
-- cannot differ: columns, options, constraints and indexes with their names, owner and rights.
-- (CREATE TABLE ... LIKE alone leaves out options and foreign keys, and gives indexes other names.)
CREATE FUNCTION score.create_shadow() RETURNS void
    LANGUAGE plpgsql AS $$
DECLARE
    before  text := current_setting('search_path');
    t       record;
    step    text;
    wanted  text[] := '{}';
    granted text[] := '{}';
BEGIN
    -- Definitions are read with the one schema in sight and carried out with the other.
    PERFORM set_config('search_path', 'score', true);
    FOR t IN
        SELECT c.oid, c.relname, c.reloptions, c.relacl, c.relowner::regrole AS owner
        FROM unnest(score.model_tables()) WITH ORDINALITY AS m (name, n)
             JOIN pg_class c ON c.oid = ('score.' || m.name)::regclass
        ORDER BY m.n
    LOOP
        wanted := wanted || format(
            'CREATE TABLE %I (LIKE score.%I INCLUDING ALL EXCLUDING INDEXES EXCLUDING CONSTRAINTS) %s',
            t.relname, t.relname, 'WITH (' || array_to_string(t.reloptions, ', ') || ')');
        -- NOT NULL is a constraint of its own from PostgreSQL 18 on, and came with LIKE.
        wanted := wanted || ARRAY(
            SELECT format('ALTER TABLE %I ADD CONSTRAINT %I %s', t.relname, conname, pg_get_constraintdef(oid))
            FROM pg_constraint WHERE conrelid = t.oid AND contype <> 'n'
            ORDER BY contype = 'f', contype <> 'p', conname);
        wanted := wanted || ARRAY(
            SELECT pg_get_indexdef(indexrelid, 0, true) FROM pg_index i
            WHERE indrelid = t.oid AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = i.indexrelid
                                                                               AND conrelid = t.oid)
            ORDER BY indexrelid);
        wanted := wanted || format('ALTER TABLE %I OWNER TO %s', t.relname, t.owner);
        granted := granted || ARRAY(
            SELECT format('GRANT %s ON %I TO %s', r.privilege_type, t.relname,
                          CASE r.grantee WHEN 0 THEN 'PUBLIC' ELSE r.grantee::regrole::text END)
            FROM aclexplode(t.relacl) r WHERE r.grantee <> t.owner::oid);
    END LOOP;
    CREATE SCHEMA score_shadow;
    FOR step IN
        SELECT format('GRANT %s ON SCHEMA score_shadow TO %s', r.privilege_type,
                      CASE r.grantee WHEN 0 THEN 'PUBLIC' ELSE r.grantee::regrole::text END)
        FROM pg_namespace n, aclexplode(n.nspacl) r
        WHERE n.nspname = 'score' AND r.grantee <> n.nspowner
    LOOP
        EXECUTE step;
    END LOOP;
    PERFORM set_config('search_path', 'score_shadow', true);
    FOREACH step IN ARRAY wanted || granted LOOP
        EXECUTE step;
    END LOOP;
    PERFORM set_config('search_path', before, true);
END
$$;

-- The live tables go to score_old and the shadow's to score, in one transaction with everything else
-- that an exchange is. Statements that other sessions have prepared find the new tables by their names.
CREATE FUNCTION score.exchange_tables() RETURNS void
    LANGUAGE plpgsql AS $$
DECLARE
    name text;
BEGIN
    CREATE SCHEMA score_old;
    FOREACH name IN ARRAY score.model_tables() LOOP
        EXECUTE format('ALTER TABLE score.%I SET SCHEMA score_old', name);
        EXECUTE format('ALTER TABLE score_shadow.%I SET SCHEMA score', name);
    END LOOP;
    DROP SCHEMA score_shadow;
END
$$;

-- What each program needs and no more. A model that is being built has the same rights as the live one.
CREATE OR REPLACE FUNCTION score.grant_projector(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
DECLARE
    schema regnamespace;
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA score TO %s', role);
    EXECUTE format('GRANT SELECT ON score.migration, score.model TO %s', role);
    EXECUTE format('GRANT UPDATE (since) ON score.model TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE ON score.chain TO %s', role);
    FOREACH schema IN ARRAY array_remove(ARRAY['score'::regnamespace, to_regnamespace('score_shadow')], NULL) LOOP
        EXECUTE format('GRANT USAGE ON SCHEMA %s TO %s', schema, role);
        EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON %s.person, %1$s.entry TO %s', schema, role);
    END LOOP;
END
$$;
CREATE OR REPLACE FUNCTION score.grant_api(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
DECLARE
    schema regnamespace;
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA score TO %s', role);
    EXECUTE format('GRANT SELECT ON score.migration, score.model TO %s', role);
    FOREACH schema IN ARRAY array_remove(ARRAY['score'::regnamespace, to_regnamespace('score_shadow')], NULL) LOOP
        EXECUTE format('GRANT USAGE ON SCHEMA %s TO %s', schema, role);
        EXECUTE format('GRANT SELECT ON %s.person, %1$s.entry TO %s', schema, role);
    END LOOP;
END
$$;
-- Whoever writes to the model already goes on to do so.
SELECT score.grant_projector(r.grantee::regrole)
FROM pg_class c, aclexplode(c.relacl) r
WHERE c.oid = 'score.person'::regclass AND r.privilege_type = 'INSERT' AND r.grantee <> c.relowner;
