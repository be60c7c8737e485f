-- Who did what when in the history: functions of numbers alone, so that the two databases agree without reading each
-- other. In the session's temporary schema, so that nothing of them stays.
--
-- Settings: history.persons (a tenth of the scale), history.from_ms (when the history begins), history.span_ms.
--
-- Of every 106 positions, 100 are of ordinary persons with 10 events each, one is of a person who has a hundredth of the
-- scale, and five are of a hundred persons who have 1/2000 of it each. An ordinary person's events are spread over a
-- quarter of the history; a fifth of the persons were there near the beginning, as after an import.
CREATE FUNCTION pg_temp.persons() RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN current_setting('history.persons')::bigint;

CREATE FUNCTION pg_temp.from_ms() RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN current_setting('history.from_ms')::bigint;

CREATE FUNCTION pg_temp.span_ms() RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN current_setting('history.span_ms')::bigint;

CREATE FUNCTION pg_temp.events() RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN pg_temp.persons() / 10 * 106;

-- When the event at a position was written, in milliseconds.
CREATE FUNCTION pg_temp.ms(pos bigint) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN pg_temp.from_ms() + (pos::double precision * pg_temp.span_ms() / pg_temp.events())::bigint;

CREATE FUNCTION pg_temp.at(ms bigint) RETURNS timestamptz LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN to_timestamp(ms::double precision / 1000);

-- A UUID of version 7.
CREATE FUNCTION pg_temp.v7(ms bigint, n bigint, salt bigint) RETURNS uuid LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN (lpad(to_hex(ms), 12, '0') || '7' || lpad(to_hex(hashint8extended(n, salt) & 4095), 3, '0')
            || '8' || lpad(to_hex(hashint8extended(n, salt + 9) & 1152921504606846975), 15, '0'))::uuid;

-- Between two events of an ordinary person: so many persons have one.
CREATE FUNCTION pg_temp.apart() RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN pg_temp.persons() / 40;

-- How many of an ordinary person's ten turns come before the history's end; the others come at its beginning instead.
CREATE FUNCTION pg_temp.unturned(person bigint) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN least(10, (pg_temp.persons() - person + pg_temp.apart() - 1) / pg_temp.apart());

-- Where an event is. Ordinary persons are 0 to persons - 1, then comes the largest one, then the hundred.
CREATE FUNCTION pg_temp.position_of(person bigint, version bigint) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE
        WHEN person = pg_temp.persons() THEN (version - 1) * 106 + 101
        WHEN person > pg_temp.persons() THEN
            ((version - 1) * 100 + person - pg_temp.persons() - 1) / 5 * 106
            + ((version - 1) * 100 + person - pg_temp.persons() - 1) % 5 + 102
        ELSE (((person + (version - 1 + pg_temp.unturned(person)) % 10 * pg_temp.apart()) % pg_temp.persons() * 10
               + (version - 1 + pg_temp.unturned(person)) % 10) / 100) * 106
             + ((person + (version - 1 + pg_temp.unturned(person)) % 10 * pg_temp.apart()) % pg_temp.persons() * 10
                + (version - 1 + pg_temp.unturned(person)) % 10) % 100 + 1
    END;

-- The reverse: a position's person.
CREATE FUNCTION pg_temp.person_at(pos bigint) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE
        WHEN (pos - 1) % 106 < 100 THEN
            (((pos - 1) / 106 * 100 + (pos - 1) % 106) / 10
             - ((pos - 1) / 106 * 100 + (pos - 1) % 106) % 10 * pg_temp.apart() + pg_temp.persons()) % pg_temp.persons()
        WHEN (pos - 1) % 106 = 100 THEN pg_temp.persons()
        ELSE pg_temp.persons() + 1 + ((pos - 1) / 106 * 5 + (pos - 1) % 106 - 101) % 100
    END;

-- And its version.
CREATE FUNCTION pg_temp.version_at(pos bigint, person bigint) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE
        WHEN (pos - 1) % 106 < 100 THEN
            (((pos - 1) / 106 * 100 + (pos - 1) % 106) % 10 - pg_temp.unturned(person) + 10) % 10 + 1
        WHEN (pos - 1) % 106 = 100 THEN (pos - 1) / 106 + 1
        ELSE ((pos - 1) / 106 * 5 + (pos - 1) % 106 - 101) / 100 + 1
    END;

-- How many events a person has.
CREATE FUNCTION pg_temp.versions(person bigint) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE WHEN person < pg_temp.persons() THEN 10 WHEN person = pg_temp.persons() THEN pg_temp.persons() / 10 ELSE pg_temp.persons() / 200 END;

CREATE FUNCTION pg_temp.person_id(person bigint) RETURNS uuid LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN pg_temp.v7(pg_temp.ms(pg_temp.position_of(person, 1)), person, 1);
CREATE FUNCTION pg_temp.item_id(pos bigint) RETURNS uuid LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN pg_temp.v7(pg_temp.ms(pos), pos, 20);
CREATE FUNCTION pg_temp.event_id(pos bigint) RETURNS uuid LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN pg_temp.v7(pg_temp.ms(pos), pos, 40);
-- The zero UUID stands for the event before the first one.
CREATE FUNCTION pg_temp.person_event_id(person bigint, version bigint) RETURNS uuid LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE version WHEN 0 THEN '00000000-0000-0000-0000-000000000000'
                        ELSE pg_temp.event_id(pg_temp.position_of(person, version)) END;
-- By the version of the person, whose first event made no score.
CREATE FUNCTION pg_temp.score_event_id(person bigint, version bigint) RETURNS uuid LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE version WHEN 1 THEN '00000000-0000-0000-0000-000000000000'
                        ELSE pg_temp.v7(pg_temp.ms(pg_temp.position_of(person, version)) + 30,
                                        pg_temp.position_of(person, version), 60) END;

-- What is known of a person. The cpf of person n is 10000000000 + n.
SET TimeZone = 'UTC';
CREATE FUNCTION pg_temp.cpf(person bigint) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN 10000000000 + person;
CREATE FUNCTION pg_temp.name(person bigint) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN (ARRAY['Maria', 'João', 'Ana', 'Pedro', 'Francisca', 'Luiz', 'Beatriz', 'Antônio'])[person % 8 + 1]
           || ' da Silva ' || (ARRAY['Santos', 'Oliveira', 'Souza', 'Lima', 'Pereira'])[person % 5 + 1];
CREATE FUNCTION pg_temp.address(person bigint) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN 'Rua das Laranjeiras ' || person % 2999 + 1 || ', Rio de Janeiro';
CREATE FUNCTION pg_temp.born(person bigint) RETURNS timestamptz LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN '1950-01-01Z'::timestamptz + (person % 20000) * interval '1 day';
CREATE FUNCTION pg_temp.created_at(person bigint) RETURNS timestamptz LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN pg_temp.at(pg_temp.ms(pg_temp.position_of(person, 1)));

-- Version 1 is the person, every later one an item: income, asset and debt in turn.
CREATE FUNCTION pg_temp.kind(version bigint) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE WHEN version = 1 THEN 'person' WHEN version % 3 = 2 THEN 'income' WHEN version % 3 = 0 THEN 'asset'
                ELSE 'debt' END;
-- All items of a kind are worth the same to their person, so that a sum needs no look at the others.
CREATE FUNCTION pg_temp.value(person bigint, kind text) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE kind WHEN 'asset' THEN 100000 ELSE 1000 END + person % 1000;
CREATE FUNCTION pg_temp.score(person bigint, kind text) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE kind WHEN 'asset' THEN pg_temp.value(person, kind) / 20
                     WHEN 'income' THEN pg_temp.value(person, kind) / 50
                     ELSE -(pg_temp.value(person, kind) / 20) END;
CREATE FUNCTION pg_temp.total(person bigint, version bigint) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN (version + 1) / 3 * pg_temp.score(person, 'income') + version / 3 * pg_temp.score(person, 'asset')
           + (version - 1) / 3 * pg_temp.score(person, 'debt');

-- Rows first, indexes after: takes what is not a partition's share of an index of the whole away from tables, and
-- brings it back.
CREATE TEMPORARY TABLE taken_away (n integer GENERATED ALWAYS AS IDENTITY, last boolean, statement text);
CREATE FUNCTION pg_temp.bare(VARIADIC tables regclass[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    it record;
BEGIN
    FOR it IN
        SELECT c.conrelid::regclass AS of, c.conname, pg_get_constraintdef(c.oid) AS definition, c.contype = 'f' AS refers
        FROM pg_constraint c
        WHERE c.contype IN ('p', 'u', 'f') AND (c.conrelid = ANY (tables) OR c.confrelid = ANY (tables))
          AND c.conparentid = 0
        ORDER BY c.contype = 'f' DESC
    LOOP
        INSERT INTO taken_away (last, statement)
        VALUES (it.refers, format('ALTER TABLE %s ADD CONSTRAINT %I %s', it.of, it.conname, it.definition));
        EXECUTE format('ALTER TABLE %s DROP CONSTRAINT %I', it.of, it.conname);
    END LOOP;
    FOR it IN
        SELECT c.oid::regclass AS index, pg_get_indexdef(c.oid) AS definition
        FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
        WHERE i.indrelid = ANY (tables) AND NOT c.relispartition
    LOOP
        INSERT INTO taken_away (last, statement) VALUES (false, it.definition);
        EXECUTE format('DROP INDEX %s', it.index);
    END LOOP;
END
$$;
CREATE FUNCTION pg_temp.dress() RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    it record;
BEGIN
    FOR it IN SELECT * FROM taken_away t ORDER BY t.last, t.n LOOP
        EXECUTE it.statement;
    END LOOP;
    TRUNCATE taken_away;
END
$$;

-- Partitions of a tenth of the scale, so that every scale has as many.
CREATE FUNCTION pg_temp.partitions(positions bigint) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    ALTER TABLE outbox.event DETACH PARTITION outbox.event_1;
    EXECUTE format('ALTER TABLE outbox.event ATTACH PARTITION outbox.event_1 FOR VALUES FROM (MINVALUE) TO (%s)',
                   pg_temp.persons() + 1);
    WHILE (SELECT max(p.upper) FROM outbox.partition p) <= positions LOOP
        PERFORM outbox.add_partition(pg_temp.persons());
    END LOOP;
END
$$;

-- Four bytes of an id, as the inbox remembers it.
CREATE FUNCTION pg_temp.short(bits bit(64)) RETURNS bytea LANGUAGE sql IMMUTABLE
    RETURN int4send((substring(bits FROM 1 FOR 32) # substring(bits FROM 33 FOR 32))::integer);
CREATE FUNCTION pg_temp.short(high bit(64), low bit(64)) RETURNS bytea LANGUAGE sql IMMUTABLE
    RETURN pg_temp.short(((high << 29) | (high >> 35)) # low);
CREATE FUNCTION pg_temp.short(id uuid) RETURNS bytea LANGUAGE sql IMMUTABLE
    RETURN pg_temp.short(('x' || left(translate(id::text, '-', ''), 16))::bit(64), ('x' || right(translate(id::text, '-', ''), 16))::bit(64));

-- The event that is a person's baseline.
CREATE FUNCTION pg_temp.baseline_id(person uuid) RETURNS uuid LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN pg_temp.v7(pg_temp.ms(pg_temp.events()), uuid_hash_extended(person, 0), 80);

-- Full partitions are known to be full since then. `ratio`: events of persons for each position.
CREATE FUNCTION pg_temp.ages(last bigint, ratio double precision) RETURNS void LANGUAGE sql AS $$
    INSERT INTO outbox.partition_age (name, last_position, full_since)
    SELECT p.name, p.upper - 1, pg_temp.at(pg_temp.ms((p.upper * ratio)::bigint)) FROM outbox.partition p
    WHERE p.upper - 1 <= last
    ON CONFLICT (name) DO UPDATE SET last_position = excluded.last_position, full_since = excluded.full_since;
    -- The one in use began just now, so that no relay ends it meanwhile.
    INSERT INTO outbox.partition_age (name, last_position) VALUES ('event_0', 0) ON CONFLICT DO NOTHING
$$;
