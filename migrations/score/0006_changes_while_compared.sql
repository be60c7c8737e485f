-- What changes while a swap compares the two models, so that the live one stands still only for what has changed since.
--
-- A swap compares both models page by page while everybody goes on, and remembers what differs. From before the first
-- page on, triggers note the persons and the chains whose rows change. So each change either was visible to the page, or
-- is noted. The triggers exist only during a swap: nothing else pays for them.

-- Without WAL: after a crash of the server the swap has ended too, and begins with empty tables. A row: something of it
-- was changed. The same one may be there many times.
CREATE UNLOGGED TABLE score.changed_person (id uuid NOT NULL);
CREATE UNLOGGED TABLE score.changed_chain (
    source         text NOT NULL,
    aggregate_type text NOT NULL,
    aggregate_id   text NOT NULL
);

-- The lock of a swap, of which there is one at a time: whether this session got it. It goes with the session.
CREATE FUNCTION score.try_swap() RETURNS boolean
    LANGUAGE sql VOLATILE
    SET search_path = pg_catalog, pg_temp
    RETURN pg_try_advisory_lock('score.model'::regclass::oid::int, 2);
REVOKE EXECUTE ON FUNCTION score.try_swap() FROM PUBLIC;

-- Notes the rows of a statement. The first argument is the table to note in, the second the expressions, the third a
-- condition. While the lock of a swap is free, nobody compares: the swap was killed, and its triggers are left over. With
-- the owner's rights, so that writers need none on what is noted.
CREATE FUNCTION score.note_change() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    side text;
BEGIN
    IF pg_try_advisory_xact_lock_shared('score.model'::regclass::oid::int, 2) THEN
        RETURN NULL;
    END IF;
    FOREACH side IN ARRAY CASE TG_OP WHEN 'INSERT' THEN ARRAY['new_rows'] WHEN 'DELETE' THEN ARRAY['old_rows']
                                     ELSE ARRAY['old_rows', 'new_rows'] END
    LOOP
        EXECUTE format('INSERT INTO score.%I SELECT %s FROM %I WHERE %s', TG_ARGV[0], TG_ARGV[1], side, TG_ARGV[2]);
    END LOOP;
    RETURN NULL;
END
$$;
REVOKE EXECUTE ON FUNCTION score.note_change() FROM PUBLIC;

-- The tables whose changes are noted, with the arguments of their triggers.
CREATE FUNCTION score.noted_tables() RETURNS TABLE (relation regclass, target text, expressions text, condition text)
    LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
    SELECT to_regclass(format('%I.%I', s.schema, t.name)), 'changed_person', t.column_name, 'true'
    FROM unnest(ARRAY['score', 'score_shadow']) AS s (schema),
         (VALUES ('person', 'id'), ('entry', 'person_id')) AS t (name, column_name)
    WHERE to_regclass(format('%I.%I', s.schema, t.name)) IS NOT NULL
    UNION ALL
    -- The inbox is installed after this schema.
    SELECT to_regclass('inbox.aggregate'), 'changed_chain', 'source, aggregate_type, aggregate_id',
           'consumer IN (SELECT consumer FROM score.model)'
$$;

-- Makes the triggers of one table. It waits for those who write to the table, and they wait for it, so limit its wait for
-- the lock. Taking the first lock waits for a vacuum of the table and stops nobody else.
CREATE FUNCTION score.note_changes_of(noted regclass) RETURNS void
    LANGUAGE plpgsql AS $$
DECLARE
    t record;
BEGIN
    SELECT * INTO STRICT t FROM score.noted_tables() n WHERE n.relation = noted;
    EXECUTE format('CREATE OR REPLACE TRIGGER note_insert AFTER INSERT ON %s REFERENCING NEW TABLE AS new_rows '
                   'FOR EACH STATEMENT EXECUTE FUNCTION score.note_change(%L, %L, %L)',
                   noted, t.target, t.expressions, t.condition);
    EXECUTE format('CREATE OR REPLACE TRIGGER note_update AFTER UPDATE ON %s REFERENCING OLD TABLE AS old_rows NEW TABLE AS '
                   'new_rows FOR EACH STATEMENT EXECUTE FUNCTION score.note_change(%L, %L, %L)',
                   noted, t.target, t.expressions, t.condition);
    EXECUTE format('CREATE OR REPLACE TRIGGER note_delete AFTER DELETE ON %s REFERENCING OLD TABLE AS old_rows '
                   'FOR EACH STATEMENT EXECUTE FUNCTION score.note_change(%L, %L, %L)',
                   noted, t.target, t.expressions, t.condition);
END
$$;

-- Removes the triggers of one table, as the swap does in its end, and whoever finds them left over.
CREATE FUNCTION score.forget_changes_of(noted regclass) RETURNS void
    LANGUAGE plpgsql AS $$
DECLARE
    name text;
BEGIN
    FOR name IN
        SELECT t.tgname FROM pg_trigger t
        WHERE t.tgrelid = noted AND t.tgfoid = 'score.note_change()'::regprocedure
    LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', name, noted);
    END LOOP;
END
$$;

-- What an item adds to the score, as the projector computes it: a twentieth of an asset, a fiftieth of an income, a
-- twentieth of a debt taken away, rounded down before the sign (a quotient by / has 16 digits only). Null for a value that
-- the contract does not allow. `verify`
-- sums up by it, and judges what differs by its own computation.
CREATE FUNCTION score.of_item(type text, value numeric) RETURNS numeric
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE WHEN value >= 0 AND value < 1000000000000000 AND scale(trim_scale(value)) <= 4
                THEN CASE type WHEN 'asset' THEN div(value, 20) WHEN 'income' THEN div(value, 50)
                               WHEN 'debt' THEN -div(value, 20) END
           END;

-- Only the owner rebuilds.
REVOKE EXECUTE ON FUNCTION score.noted_tables(), score.note_changes_of(regclass), score.forget_changes_of(regclass) FROM PUBLIC;
