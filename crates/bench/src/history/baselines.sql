-- A baseline of everybody above the history, as `person-api republish --all` appends them.
DO $$
DECLARE
    first bigint := (SELECT last_value FROM outbox.position) + 1;
BEGIN
    WHILE (SELECT max(p.upper) FROM outbox.partition p) <= first + pg_temp.persons() + 100 LOOP
        PERFORM outbox.add_partition(pg_temp.persons());
    END LOOP;
    INSERT INTO outbox.event (position, id, aggregate_type, aggregate_id, version, type, payload, headers)
    SELECT first + n - 1, pg_temp.v7(pg_temp.ms(pg_temp.events()), n, 80), 'person', id, version + 1,
           'person.baseline', body, '{"baseline": true}'
    FROM (SELECT row_number() OVER (ORDER BY id) AS n, id, version FROM person.person) p,
         LATERAL (SELECT row_to_json(body) AS body
                  FROM (SELECT o.id, o.cpf, o.name, o.address, o.date_of_birth, o.created_at, o.status,
                               ARRAY(SELECT row_to_json(item) FROM
                                     (SELECT i.id, i.type, trim_scale(i.value) AS value, i.created_at
                                      FROM person.income i WHERE i.person_id = o.id ORDER BY i.id) item) AS incomes,
                               ARRAY(SELECT row_to_json(item) FROM
                                     (SELECT i.id, i.type, trim_scale(i.value) AS value, i.created_at
                                      FROM person.asset i WHERE i.person_id = o.id ORDER BY i.id) item) AS assets,
                               ARRAY(SELECT row_to_json(item) FROM
                                     (SELECT i.id, trim_scale(i.value) AS value, i.created_at
                                      FROM person.debt i WHERE i.person_id = o.id ORDER BY i.id) item) AS debts
                        FROM person.person o WHERE o.id = p.id) body) b;
    UPDATE person.person SET version = version + 1;
    PERFORM setval('outbox.position', first + pg_temp.persons() + 100);
    UPDATE outbox.relay SET low_water = first + pg_temp.persons() + 100, high = first + pg_temp.persons() + 100;
END
$$;
